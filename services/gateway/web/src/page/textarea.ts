const LONG = 5_000; // characters; longer text fills the highest field, and measuring it would slow each key

/** Makes a text field as high as its text; the style sheet limits the height. */
export function grow(area: HTMLTextAreaElement): void {
  const long = area.value.length > LONG;
  // With dir=auto, each paragraph has a direction of its own. A long text gets one direction, because finding the
  // directions of its paragraphs would slow each key.
  area.style.unicodeBidi = long ? "isolate" : "";
  area.style.height = long ? "100vh" : "auto";
  if (!long) area.style.height = `${area.scrollHeight}px`;
}

/** Whether the keyboard is on the screen. It has no Shift+Enter, so Enter begins a new line, and the button sends. */
export function hasTouchKeyboard(): boolean {
  return window.matchMedia("(hover: none) and (pointer: coarse)").matches;
}

/** Whether the key sends the text: Ctrl+Enter, ⌘+Enter, or Enter without Shift if the keyboard is not on the screen. */
export function isSendKey(event: KeyboardEvent): boolean {
  if (!isEnter(event)) return false;
  return event.ctrlKey || event.metaKey || (!event.shiftKey && !hasTouchKeyboard());
}

/**
 * Whether the key is an ordinary Enter, and not an Enter that ends a word of an input method. For an Enter that
 * ends a word, browsers set `isComposing`. Safari ends the composition first, so it sets the key code 229 instead (UI
 * Events).
 */
export function isEnter(event: KeyboardEvent): boolean {
  return event.key === "Enter" && !event.isComposing && event.keyCode !== 229;
}
