/** The keyboard map, as the page shows it. */
export const SHORTCUTS: readonly (readonly [keys: string, action: string])[] = [
  ["Enter", "Send"],
  ["Shift Enter", "New line"],
  ["Ctrl Enter or ⌘ Enter", "Send, on touch screens too"],
  ["Esc", "Stop the answer, close what is open"],
  ["Ctrl K or ⌘ K", "New chat"],
  ["/", "Write a message"],
  ["?", "This list"],
];

export interface ShortcutActions {
  escape: () => void;
  newChat: () => void;
  write: () => void;
  help: () => void;
}

/** Runs the action of a key. If it returns true, the caller must prevent the browser's own action for the key. */
export function runShortcut(event: KeyboardEvent, actions: ShortcutActions): boolean {
  if (event.isComposing) return false;
  const control = event.ctrlKey || event.metaKey;
  if (event.key === "Escape") {
    actions.escape();
    return false;
  }
  if (event.key.toLowerCase() === "k" && control && !event.shiftKey && !event.altKey) actions.newChat();
  else if (isWriting(event.target) || control || event.altKey) return false;
  else if (event.key === "?") actions.help();
  else if (event.key === "/") actions.write();
  else return false;
  return true;
}

/** Whether the typed characters belong to an input field. */
function isWriting(target: EventTarget | null): boolean {
  return target instanceof Element && target.closest("input, textarea, select, [contenteditable]") !== null;
}
