import { signal } from "@preact/signals";
import { newId } from "../chat/id";
import { mergeHeaders, newHeader, sameHeader, type Header, type StoredConversation } from "../chat/merge";
import type { Message } from "../chat/message";
import { withoutPictures } from "../chat/pictures";
import { titleOf } from "../chat/title";
import { parseConversationV1, parseHeader, parseMessage } from "./stored-format";

const HEADER = "nanochat.conversation.";
const MESSAGE = "nanochat.message.";
// When a page loads, it removes the messages of conversations that were deleted longer ago than this. A more recent
// deletion may still be undone in another tab, so the messages must stay.
const FINAL_AFTER_MS = 3_600_000;
const FORGET_AFTER_MS = 30 * 86_400_000; // after this time, probably no open tab writes into a deleted conversation

/** Functions that are called with each header or message that another tab has stored. */
export interface RemoteChanges {
  header: (header: Header) => void;
  message: (conversation: string, message: Message) => void;
}

/**
 * Stores conversations in the browser: one entry for each message, and usually one entry for the header of each
 * conversation.
 *
 * A tab cannot read and write an entry in one atomic step, and it learns of other tabs' changes late, so two tabs that
 * write the same entry can lose a change. Therefore each message has its own entry, and while a tab writes an answer,
 * other tabs leave the answer's entry alone as long as they know that the tab writes it. Any tab may change a header,
 * so each change is stored under a new key. The new entry contains the whole header as this tab knows it. The tab then
 * removes the older entries whose changes the new entry contains. The stored header is the merge of all its entries. No
 * removal loses a change, because an entry is removed only after another entry with its changes was stored. An
 * unreadable entry stays until the person deletes it or its conversation.
 */
export class ConversationStore {
  /** Set while the browser refuses to store more, or stores nothing at all. */
  readonly refusal = signal<"full" | "blocked" | null>(null);
  /** Keys of entries that cannot be read. */
  readonly damaged = signal<readonly string[]>([]);
  /**
   * The keys of each header's entries; null until they are needed. A scan of all keys at each change would be slow. The
   * key of an entry that another tab has just stored may be missing in this map. A later change or `load` merges that
   * entry.
   */
  private headerKeys: Map<string, Set<string>> | null = null;
  /** The deleted conversations that may still have stored messages; null if they are not known. */
  private removable: Set<string> | null = null;

  /** `storage` is null if the browser blocks it. */
  constructor(private readonly storage: Storage | null) {
    if (!storage) this.refusal.value = "blocked";
  }

  load(): StoredConversation[] {
    const damaged: string[] = [];
    const read = <T>(key: string, parse: (text: string) => T): T[] => {
      try {
        return [parse(this.storage!.getItem(key)!)];
      } catch {
        damaged.push(key);
        return [];
      }
    };
    const headers = new Map<string, Header>();
    const messages = new Map<string, Message[]>();
    this.headerKeys = null;
    for (const key of [...this.keysOfHeaders().values()].flatMap((keys) => [...keys])) {
      for (const { header, messages: old } of read(key, parseEntry)) {
        const other = headers.get(header.id);
        headers.set(header.id, other ? mergeHeaders(other, header) : header);
        if (old.length > 0) getOrSet(messages, header.id).push(...old);
      }
    }
    for (const key of this.keys(MESSAGE)) {
      const id = conversationOf(key);
      if (isDeleted(headers.get(id), FINAL_AFTER_MS)) this.storage!.removeItem(key);
      else for (const message of read(key, parseMessage)) getOrSet(messages, id).push(message);
    }
    this.damaged.value = damaged;
    for (const [id, found] of messages) if (!headers.has(id)) headers.set(id, headerFor(id, found[0]!));
    for (const [id, header] of headers) {
      if (!isDeleted(header, FORGET_AFTER_MS)) continue;
      for (const { key } of this.headersOf(id)) this.remove(key);
      headers.delete(id);
    }
    return [...headers.values()].map((header) => ({ header, messages: messages.get(header.id) ?? [] }));
  }

  /** Merges a header with its stored entries, stores the result and returns it. */
  saveHeader(header: Header): Header {
    const stored = this.headersOf(header.id);
    // An entry of the first format contains the messages too. They get their own entries before this entry is removed.
    if (!stored.every((entry) => this.saveMessages(header.id, entry.messages))) return header;
    const merged = stored.reduce((sum, entry) => mergeHeaders(sum, entry.header), header);
    // If several entries are equal, all tabs keep the entry with the first key, so that no two tabs remove each other's
    // entry.
    const same = stored.filter((entry) => sameHeader(entry.header, merged)).map((entry) => entry.key);
    let kept = same.sort()[0] ?? `${HEADER}${header.id}.${newId()}`;
    if (same.length === 0 && !this.put(kept, merged)) {
      // Without room for a further entry, the change replaces a stored entry. This is the only case in which two tabs
      // can lose a change.
      kept = stored[0]?.key ?? kept;
      if (!this.put(kept, merged)) return merged;
    }
    for (const { key } of stored) if (key !== kept) this.remove(key);
    if (merged.deleted.value) this.removable?.add(header.id);
    return merged;
  }

  /** Stores messages, without their pictures if the browser has no room for them. Returns whether all were stored. */
  saveMessages(conversation: string, messages: readonly Message[]): boolean {
    return messages.every((message) => {
      const key = messageKey(conversation, message.id);
      return this.put(key, message) || this.put(key, plain(message));
    });
  }

  /** The stored copy of a message; null if it is missing or unreadable. */
  message(conversation: string, id: string): Message | null {
    const text = this.storage?.getItem(messageKey(conversation, id));
    try {
      return text == null ? null : parseMessage(text);
    } catch {
      return null;
    }
  }

  save({ header, messages }: StoredConversation): void {
    this.saveMessages(header.id, messages);
    this.saveHeader(header);
  }

  /** Removes the messages of deleted conversations for good. Their headers stay and tell other tabs of the deletion. */
  removeMessages(conversations: ReadonlySet<string>): void {
    if (conversations.size === 0) return;
    for (const key of this.keys(MESSAGE)) if (conversations.has(conversationOf(key))) this.remove(key);
  }

  /** The damaged entries as text that the person can save. */
  damagedText(): string {
    return this.damaged.value.map((key) => this.storage?.getItem(key) ?? "").join("\n");
  }

  discardDamaged(): void {
    for (const key of this.damaged.value) this.remove(key);
    this.damaged.value = [];
  }

  /** Reports the entries that other tabs store. Removals are not reported, because headers say what was deleted. */
  watch(target: Window, changes: RemoteChanges): void {
    target.addEventListener("storage", ({ storageArea, key, newValue }) => {
      if (storageArea !== this.storage) return;
      if (key === null) {
        this.headerKeys = null; // all entries were removed
        return;
      }
      this.noteKey(key);
      if (newValue === null) return;
      try {
        if (key.startsWith(HEADER)) {
          const { header, messages } = parseEntry(newValue);
          if (header.deleted.value) this.removable?.add(header.id);
          changes.header(header);
          for (const message of messages) changes.message(header.id, message);
        } else if (key.startsWith(MESSAGE)) {
          changes.message(conversationOf(key), parseMessage(newValue));
        }
      } catch {
        this.damaged.value = [...new Set([...this.damaged.value, key])];
      }
    });
    // A page that the browser had frozen has missed events, so the keys must be read again.
    target.addEventListener("pageshow", () => (this.headerKeys = null));
  }

  /** The entries of a header that can be read. */
  private headersOf(id: string): (StoredConversation & { key: string })[] {
    return [...(this.keysOfHeaders().get(id) ?? [])].flatMap((key) => {
      try {
        return [{ key, ...parseEntry(this.storage!.getItem(key)!) }];
      } catch {
        return [];
      }
    });
  }

  private keysOfHeaders(): Map<string, Set<string>> {
    if (!this.headerKeys) {
      this.headerKeys = new Map();
      for (const key of this.keys(HEADER)) this.noteKey(key);
    }
    return this.headerKeys;
  }

  /** Keeps `headerKeys` current after an entry was stored or removed. */
  private noteKey(key: string): void {
    if (!this.headerKeys || !key.startsWith(HEADER)) return;
    const id = conversationOf(key);
    const keys = this.headerKeys.get(id) ?? new Set();
    if (this.storage!.getItem(key) === null) keys.delete(key);
    else keys.add(key);
    this.headerKeys.set(id, keys);
  }

  private remove(key: string): void {
    this.storage?.removeItem(key);
    this.noteKey(key);
  }

  private put(key: string, value: Header | Message): boolean {
    if (!this.storage) return false;
    const text = JSON.stringify(value);
    const stored = this.tryPut(key, text) || (this.makeRoom() && this.tryPut(key, text));
    this.refusal.value = stored ? null : "full";
    return stored;
  }

  private tryPut(key: string, text: string): boolean {
    try {
      this.storage!.setItem(key, text);
      this.noteKey(key);
      return true;
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
      return false;
    }
  }

  /** Removes the messages of deleted conversations. Returns whether there were any. */
  private makeRoom(): boolean {
    const before = this.storage!.length;
    const candidates = this.removable ?? this.keysOfHeaders().keys();
    this.removeMessages(new Set([...candidates].filter((id) => this.isStoredAsDeleted(id))));
    this.removable = new Set();
    return this.storage!.length < before;
  }

  private isStoredAsDeleted(id: string): boolean {
    const headers = this.headersOf(id).map((entry) => entry.header);
    return headers.length > 0 && headers.reduce(mergeHeaders).deleted.value;
  }

  private keys(prefix: string): string[] {
    return this.storage ? Object.keys(this.storage).filter((key) => key.startsWith(prefix)) : [];
  }
}

/** A header for messages whose own header is missing or damaged. In a merge, every other header counts as later. */
export function headerFor(conversation: string, first: Message): Header {
  const header = newHeader(conversation, titleOf(first.content), first.createdAt);
  return { ...header, title: { value: header.title.value, at: 0 } };
}

/** Reads a header, or an entry of the first format, which has messages too. Throws if the text is neither. */
function parseEntry(text: string): StoredConversation {
  return parseConversationV1(text) ?? { header: parseHeader(text), messages: [] };
}

/** Whether the conversation was deleted at least this many milliseconds ago. */
function isDeleted(header: Header | undefined, milliseconds: number): boolean {
  return header !== undefined && header.deleted.value && header.deleted.at < Date.now() - milliseconds;
}

function plain(message: Message): Message {
  return message.role === "user" ? message : { ...message, toolEvents: withoutPictures(message.toolEvents) };
}

function getOrSet(lists: Map<string, Message[]>, key: string): Message[] {
  const list = lists.get(key) ?? [];
  lists.set(key, list);
  return list;
}

function messageKey(conversation: string, id: string): string {
  return `${MESSAGE}${conversation}.${id}`;
}

/** The conversation's id in the key of a header or message. In earlier versions, a header's key ended with this id. */
function conversationOf(key: string): string {
  return key.split(".")[2]!;
}
