import type { Signal } from "@preact/signals";
import type { ComponentChildren } from "preact";
import { useId, useLayoutEffect, useRef } from "preact/hooks";
import { IconButton } from "./IconButton";
import { CloseIcon } from "./icons";

interface Props {
  open: Signal<boolean>;
  title: string;
  testId: string;
  children: ComponentChildren;
}

/** A window over the page. The browser keeps the focus in it, and closes it on Escape. */
export function Dialog({ open, title, testId, children }: Props) {
  const dialog = useRef<HTMLDialogElement>(null);
  const id = useId();
  // A layout effect opens the window before it is painted, so a key pressed after the paint reaches the open window.
  useLayoutEffect(() => {
    if (open.value) dialog.current!.showModal();
    else dialog.current!.close();
  }, [open.value]);
  const close = () => (open.value = false);
  return (
    <dialog
      ref={dialog}
      class="settings"
      aria-labelledby={id}
      data-testid={testId}
      onClose={close}
      onClick={(event) => event.target === dialog.current && close()}
    >
      {open.value && (
        <div class="settings-panel">
          <header>
            <h2 id={id}>{title}</h2>
            <IconButton label="Close" onClick={close}>
              <CloseIcon />
            </IconButton>
          </header>
          <div class="settings-body">{children}</div>
        </div>
      )}
    </dialog>
  );
}
