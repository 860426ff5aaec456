const KEY = "nanochat.draft.";

/** The texts that the person has not sent yet: one draft for each conversation. Drafts survive a reload of the tab. */
export class Drafts {
  private readonly unstored = new Map<string, string>();

  /** `storage` belongs to this tab, so that two tabs do not overwrite each other; null if the browser blocks it. */
  constructor(private readonly storage: Storage | null) {}

  /** The draft for a conversation; null stands for a new chat. */
  get(conversation: string | null): string {
    const key = KEY + (conversation ?? "");
    return this.unstored.get(key) ?? this.storage?.getItem(key) ?? "";
  }

  set(conversation: string | null, text: string): void {
    const key = KEY + (conversation ?? "");
    this.unstored.delete(key);
    try {
      if (text === "") this.storage?.removeItem(key);
      else this.storage?.setItem(key, text);
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
    }
    if (text !== "" && this.storage?.getItem(key) !== text) this.unstored.set(key, text); // no room, or no storage
  }
}
