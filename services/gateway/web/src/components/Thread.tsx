import { Fragment } from "preact";
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
  const memoryStart = conversation?.memoryStart.value;
  // Scrolls to the end when a conversation is opened, or when this tab asks a question in it, but not when another tab
  // changes the conversation.
  useEffect(toEnd, [conversation, app.asked.value]);
  return (
    <div class="thread-frame">
      <div class="thread" ref={scroller}>
        <div class="column" ref={content}>
          {!conversation && <EmptyState />}
          {conversation &&
            messages.map((message, index) => {
              const { id, parent, role } = message.peek();
              // Versions of a message share their key, so that the focus stays on the arrows between them.
              const key = `${role} after ${parent}`;
              const last = index === messages.length - 1;
              return (
                <Fragment key={key}>
                  {id === memoryStart && <MemoryMark />}
                  {role === "user" ? (
                    <UserMessage conversation={conversation} message={message} />
                  ) : (
                    <AssistantMessage conversation={conversation} message={message} last={last} />
                  )}
                </Fragment>
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

/** Marks the first message that the model sees, in a conversation that is longer than its context. */
function MemoryMark() {
  return (
    <p class="memory-mark" role="note" data-testid="memory-mark">
      The model no longer sees what is above.
    </p>
  );
}
