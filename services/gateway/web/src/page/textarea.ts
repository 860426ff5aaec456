/** Makes a text field as high as its text; its style sheet caps the height. */
export function grow(area: HTMLTextAreaElement): void {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

/** Enter sends; Shift+Enter, and the Enter that ends an input method's word, do not. */
export function isSendKey(event: KeyboardEvent): boolean {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}
