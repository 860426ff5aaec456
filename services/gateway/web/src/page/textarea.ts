/** Makes a text field as high as its text; the style sheet limits the height. */
export function grow(area: HTMLTextAreaElement): void {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

/** Whether the key sends the text: Enter does, but not Shift+Enter or an Enter that ends an input method's word. */
export function isSendKey(event: KeyboardEvent): boolean {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}
