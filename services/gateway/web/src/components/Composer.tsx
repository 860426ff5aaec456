import { useSignal } from "@preact/signals";
import { useLayoutEffect, useRef } from "preact/hooks";
import { MOST_CHARACTERS } from "../chat/history";
import { grow, hasTouchKeyboard, isSendKey } from "../page/textarea";
import { IconButton } from "./IconButton";
import { usePage } from "./context";
import { SendIcon, StopIcon } from "./icons";

/** The text field at the foot of the page. Each conversation keeps its own draft. */
export function Composer() {
  const { app, drafts } = usePage();
  const area = useRef<HTMLTextAreaElement>(null);
  const draft = useSignal("");
  const conversation = app.active.value;
  const id = conversation?.id ?? null;
  const running = conversation?.writing.value ?? false;

  const focus = () => {
    // Without a pointer, the field does not get the focus, because the focus would open the keyboard on the screen,
    // which covers half the page.
    if (window.matchMedia("(hover: hover)").matches) area.current?.focus();
  };
  useLayoutEffect(() => {
    draft.value = drafts.get(id);
    focus();
  }, [id]);
  useLayoutEffect(() => grow(area.current!), [draft.value]);
  useLayoutEffect(() => {
    // A button such as Retry disappears when it is pressed. Nothing then has the focus, so the text field gets it.
    if (running && document.activeElement === document.body) focus();
  }, [running]);

  const write = (text: string) => {
    draft.value = text;
    drafts.set(id, text);
  };
  const send = () => {
    const text = draft.value.trim();
    if (text === "" || running) return;
    write("");
    app.send(text);
  };
  const onKeyDown = (event: KeyboardEvent) => {
    if (!isSendKey(event)) return;
    event.preventDefault();
    send();
  };
  /** Refuses inserted text that no model can read: a field with megabytes of text would freeze the page. */
  const keepOut = (event: Event, data: DataTransfer | null) => {
    const { length } = data?.getData("text/plain") ?? "";
    if (draft.value.length + length <= MOST_CHARACTERS) return;
    event.preventDefault();
    const [found, room] = [length, MOST_CHARACTERS].map((number) => number.toLocaleString("en"));
    app.toast.value = { text: `The text has ${found} characters. A message has room for ${room}.` };
  };
  const stop = () => {
    app.stop(conversation!);
    area.current?.focus();
  };
  return (
    <div class="composer" onClick={(event) => event.target === event.currentTarget && area.current?.focus()}>
      <textarea
        ref={area}
        data-testid="composer"
        rows={1}
        dir="auto"
        enterkeyhint={hasTouchKeyboard() ? "enter" : "send"}
        aria-label="Message"
        placeholder="Write a message"
        value={draft.value}
        onInput={(event) => write(event.currentTarget.value)}
        onKeyDown={onKeyDown}
        onPaste={(event) => keepOut(event, event.clipboardData)}
        onDrop={(event) => keepOut(event, event.dataTransfer)}
      />
      {running ? (
        <IconButton class="send" label="Stop (Esc)" data-testid="stop" onClick={stop}>
          <StopIcon />
        </IconButton>
      ) : (
        <IconButton class="send" label="Send (Enter)" data-testid="send" disabled={!draft.value.trim()} onClick={send}>
          <SendIcon />
        </IconButton>
      )}
    </div>
  );
}
