import { useEffect } from "preact/hooks";
import { AssistantMessage } from "./AssistantMessage";
import { EmptyState } from "./EmptyState";
import { IconButton } from "./IconButton";
import { UserMessage } from "./UserMessage";
import { usePage } from "./context";
import { useFollow } from "./follow";
import { DownIcon } from "./icons";

/** The messages of the open conversation. */
export function Thread() {
  const { app } = usePage();
  const { scroller, content, atEnd, toEnd } = useFollow();
  const conversation = app.active.value;
  const messages = conversation?.messages.value ?? [];
  // After a new question or in another conversation, show the end.
  useEffect(toEnd, [conversation, messages]);
  return (
    <div class="thread-frame">
      <div class="thread" ref={scroller}>
        <div class="column" ref={content}>
          {!conversation && <EmptyState />}
          {conversation &&
            messages.map((message, index) => {
              const { id, role } = message.peek();
              return role === "user" ? (
                <UserMessage key={id} conversation={conversation} message={message} />
              ) : (
                <AssistantMessage
                  key={id}
                  conversation={conversation}
                  message={message}
                  last={index === messages.length - 1}
                />
              );
            })}
        </div>
      </div>
      {!atEnd.value && (
        <IconButton class="to-end" label="Go to the latest message" onClick={toEnd}>
          <DownIcon />
        </IconButton>
      )}
    </div>
  );
}
