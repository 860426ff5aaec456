const LONG = 5_000; // characters; more than the highest field shows, and slow to measure with each key

/** Makes a text field as high as its text; the style sheet limits the height. */
export function grow(area: HTMLTextAreaElement): void {
  const long = area.value.length > LONG;
  // With dir=auto each paragraph has a direction of its own. In a long text, finding them would slow each key.
  area.style.unicodeBidi = long ? "isolate" : "";
  area.style.height = long ? "100vh" : "auto";
  if (!long) area.style.height = `${area.scrollHeight}px`;
}

/** Whether the keyboard is on the screen. It has no Shift+Enter, so its Enter begins a new line and the button sends. */
export function hasTouchKeyboard(): boolean {
  return window.matchMedia("(hover: none) and (pointer: coarse)").matches;
}

/** Whether the key sends the text: Enter, but not Shift+Enter; where Enter is a line break, Ctrl+Enter or ⌘+Enter. */
export function isSendKey(event: KeyboardEvent): boolean {
  if (!isEnter(event)) return false;
  return event.ctrlKey || event.metaKey || (!event.shiftKey && !hasTouchKeyboard());
}

/**
 * Whether the key is an ordinary Enter and not one that ends a word of an input method. Browsers mark the latter as
 * composing. Safari ends the composition first; there only the key code 229 of the UI Events standard tells.
 */
export function isEnter(event: KeyboardEvent): boolean {
  return event.key === "Enter" && !event.isComposing && event.keyCode !== 229;
}
