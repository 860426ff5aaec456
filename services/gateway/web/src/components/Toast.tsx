import { useEffect, useRef } from "preact/hooks";
import { usePage } from "./context";

const SHOWN_MS = 8000;

/** A short note, often with a button that undoes an action. The note stays while the pointer or the focus is on it. */
export function ToastView() {
  const { app } = usePage();
  const toast = app.toast.value;
  const timer = useRef<ReturnType<typeof setTimeout> | undefined>(undefined);
  const hold = () => clearTimeout(timer.current);
  const release = () => {
    hold();
    timer.current = setTimeout(() => (app.toast.value = null), SHOWN_MS);
  };
  useEffect(() => {
    if (toast) release();
    return hold;
  }, [toast]);
  const undo = () => {
    app.toast.value = null;
    toast?.undo?.();
  };
  return (
    <div class="toast-frame" role="status">
      {toast && (
        <div class="toast" onMouseEnter={hold} onMouseLeave={release} onFocusIn={hold} onFocusOut={release}>
          <span>{toast.text}</span>
          {toast.undo && (
            <button type="button" class="quiet" data-testid="undo" onClick={undo}>
              Undo
            </button>
          )}
        </div>
      )}
    </div>
  );
}
