import { useSignal, type Signal } from "@preact/signals";
import { useLayoutEffect, useRef } from "preact/hooks";
import type { Conversation } from "../chat/conversation";
import type { Message } from "../chat/message";
import { grow, isSendKey } from "../page/textarea";
import { count } from "../text/format";
import { CopyButton } from "./CopyButton";
import { IconButton } from "./IconButton";
import { Versions } from "./Versions";
import { usePage } from "./context";
import { EditIcon } from "./icons";

const LONG = 5_000; // characters; a longer message is shown from its beginning, so that it does not slow the page

export function UserMessage({ conversation, message }: { conversation: Conversation; message: Signal<Message> }) {
  const { app } = usePage();
  const editing = useSignal(false);
  const whole = useSignal(false);
  const { content } = message.value;
  if (editing.value) {
    return (
      <Editor
        text={content}
        onCancel={() => (editing.value = false)}
        onSend={(text) => {
          editing.value = false;
          app.edit(conversation, message, text);
        }}
      />
    );
  }
  return (
    <article class="message question" data-testid="message-user" aria-label="You">
      <div class="bubble" dir="auto">
        {whole.value ? content : content.slice(0, LONG)}
        {!whole.value && content.length > LONG && (
          <button type="button" class="quiet" data-testid="show-whole" onClick={() => (whole.value = true)}>
            … Show all {count(content.length, "character")}
          </button>
        )}
      </div>
      <footer class="actions">
        <IconButton label="Edit and send again" data-testid="edit" onClick={() => (editing.value = true)}>
          <EditIcon />
        </IconButton>
        <CopyButton label="Copy message" text={() => content} />
        <Versions conversation={conversation} message={message} />
      </footer>
    </article>
  );
}

interface EditorProps {
  text: string;
  onSend: (text: string) => void;
  onCancel: () => void;
}

function Editor({ text, onSend, onCancel }: EditorProps) {
  const area = useRef<HTMLTextAreaElement>(null);
  const draft = useSignal(text);
  useLayoutEffect(() => {
    grow(area.current!);
    area.current!.focus();
    area.current!.setSelectionRange(text.length, text.length);
  }, []);
  const send = () => draft.value.trim() !== "" && onSend(draft.value.trim());
  const onKeyDown = (event: KeyboardEvent) => {
    if (isSendKey(event)) {
      event.preventDefault();
      send();
    } else if (event.key === "Escape") {
      event.stopPropagation(); // otherwise Escape would also stop the answer
      onCancel();
    }
  };
  return (
    <div class="message question editing">
      <textarea
        ref={area}
        rows={1}
        dir="auto"
        aria-label="Edit your message"
        data-testid="edit-text"
        value={draft.value}
        onInput={(event) => {
          draft.value = event.currentTarget.value;
          grow(event.currentTarget);
        }}
        onKeyDown={onKeyDown}
      />
      <div class="edit-actions">
        <button type="button" class="button" onClick={onCancel}>
          Cancel
        </button>
        <button
          type="button"
          class="button primary"
          data-testid="edit-send"
          disabled={!draft.value.trim()}
          onClick={send}
        >
          Send
        </button>
      </div>
    </div>
  );
}
