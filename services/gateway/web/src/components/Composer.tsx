import { useSignal } from "@preact/signals";
import { useEffect, useLayoutEffect, useMemo, useRef } from "preact/hooks";
import { grow, isSendKey } from "../page/textarea";
import { IconButton } from "./IconButton";
import { usePage } from "./context";
import { SendIcon, StopIcon } from "./icons";

/** The text field at the foot of the page. Each conversation keeps its own draft while the page is open. */
export function Composer() {
  const { app } = usePage();
  const area = useRef<HTMLTextAreaElement>(null);
  const drafts = useMemo(() => new Map<string | null, string>(), []);
  const draft = useSignal("");
  const conversation = app.active.value;
  const id = conversation?.id ?? null;
  const running = conversation?.running.value != null;

  const focus = () => {
    // Focus would open a touch screen's keyboard, which covers half the page.
    if (window.matchMedia("(hover: hover)").matches) area.current?.focus();
  };
  useLayoutEffect(() => {
    draft.value = drafts.get(id) ?? "";
    focus();
  }, [id]);
  useEffect(() => grow(area.current!), [draft.value]);
  useEffect(() => {
    // A button such as Retry disappears when pressed and takes the focus with it.
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
        enterkeyhint="send"
        aria-label="Message"
        placeholder="Write a message"
        value={draft.value}
        onInput={(event) => write(event.currentTarget.value)}
        onKeyDown={onKeyDown}
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
