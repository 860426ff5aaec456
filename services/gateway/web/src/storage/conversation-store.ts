import { signal } from "@preact/signals";
import type { Conversation, Message, StoredConversation } from "../chat/conversation";

const PREFIX = "nanochat.conversation.";

/** A change by another tab: the stored conversation, or null if that tab deleted it. */
export type RemoteChange = (id: string, stored: StoredConversation | null) => void;

/**
 * Stores each conversation as an entry of its own in the browser, so that a tab overwrites only its own changes.
 * An unreadable entry stays until the person decides about it.
 */
export class ConversationStore {
  /** Set while the browser refuses to store more, or stores nothing at all. */
  readonly refusal = signal<"full" | "blocked" | null>(null);
  /** Keys of entries that cannot be read. */
  readonly damaged = signal<readonly string[]>([]);

  /** `storage` is null if the browser blocks it. */
  constructor(private readonly storage: Storage | null) {
    if (!storage) this.refusal.value = "blocked";
  }

  load(): StoredConversation[] {
    const conversations: StoredConversation[] = [];
    const damaged: string[] = [];
    for (const key of this.keys()) {
      try {
        conversations.push(parseConversation(this.storage!.getItem(key)!));
      } catch {
        damaged.push(key);
      }
    }
    this.damaged.value = damaged;
    return conversations;
  }

  save(conversation: Conversation): void {
    if (!this.storage) return;
    try {
      this.storage.setItem(PREFIX + conversation.id, JSON.stringify(conversation.toStored()));
      this.refusal.value = null;
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
      this.refusal.value = "full";
    }
  }

  remove(id: string): void {
    this.storage?.removeItem(PREFIX + id);
    if (this.refusal.value === "full") this.refusal.value = null;
  }

  /** The damaged entries as text that the person can save. */
  damagedText(): string {
    return this.damaged.value.map((key) => this.storage?.getItem(key) ?? "").join("\n");
  }

  discardDamaged(): void {
    for (const key of this.damaged.value) this.storage?.removeItem(key);
    this.damaged.value = [];
  }

  /** Reports conversations that other tabs store and delete. */
  watch(target: Window, onChange: RemoteChange): void {
    target.addEventListener("storage", (event) => {
      if (event.storageArea !== this.storage || !event.key?.startsWith(PREFIX)) return;
      const id = event.key.slice(PREFIX.length);
      if (event.newValue === null) {
        onChange(id, null);
        return;
      }
      try {
        onChange(id, parseConversation(event.newValue));
      } catch {
        this.damaged.value = [...new Set([...this.damaged.value, event.key])];
      }
    });
  }

  private keys(): string[] {
    return this.storage ? Object.keys(this.storage).filter((key) => key.startsWith(PREFIX)) : [];
  }
}

/** Throws if the text is not a conversation of this version. */
export function parseConversation(text: string): StoredConversation {
  const value = JSON.parse(text) as Partial<StoredConversation> | null;
  const valid =
    value?.version === 1 &&
    typeof value.id === "string" &&
    typeof value.title === "string" &&
    Number.isFinite(value.createdAt) &&
    Number.isFinite(value.updatedAt) &&
    Array.isArray(value.messages) &&
    value.messages.every(isMessage);
  if (!valid) throw new Error("not a stored conversation");
  return value as StoredConversation;
}

function isMessage(value: unknown): value is Message {
  const message = value as Partial<Message> | null;
  if (typeof message?.id !== "string" || typeof message.content !== "string") return false;
  if (message.role === "user") return true;
  return message.role === "assistant" && typeof message.state === "string" && Array.isArray(message.toolEvents);
}
