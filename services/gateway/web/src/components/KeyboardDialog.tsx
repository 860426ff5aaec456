import { SHORTCUTS } from "../page/shortcuts";
import { Dialog } from "./Dialog";
import { usePage } from "./context";

export function KeyboardDialog() {
  const { app } = usePage();
  return (
    <Dialog open={app.keyboardOpen} title="Keyboard" testId="keyboard">
      <dl class="shortcuts">
        {SHORTCUTS.map(([keys, action]) => (
          <div key={keys}>
            <dt>{keys}</dt>
            <dd>{action}</dd>
          </div>
        ))}
      </dl>
    </Dialog>
  );
}
