import { batch, computed, signal, type ReadonlySignal, type Signal } from "@preact/signals";
import { headerFor, type ConversationStore } from "../storage/conversation-store";
import { Tabs, type TabLinks } from "../storage/tabs";
import { Conversation } from "./conversation";
import { changed, compareProgress, type Header, type StoredConversation } from "./merge";
import { settled, type Message } from "./message";

const WATCH_MS = 3_000; // pause between two checks whether another tab still writes an answer

/** All conversations of this browser. Changes are stored, and changes of other tabs are merged. */
export class Library {
  /** All conversations, including deleted ones, because another tab may undo a deletion. */
  private readonly all = signal<readonly Conversation[]>([]);
  readonly conversations: ReadonlySignal<readonly Conversation[]> = computed(() =>
    this.all.value.filter((conversation) => !conversation.deleted.value),
  );
  private readonly tabs: Tabs;
  private readonly watched = new Set<string>();
  /** The conversations that this tab has deleted and may still restore, each with the time of the deletion. */
  private readonly deletedHere = new Map<Conversation, number>();

  constructor(
    private readonly store: ConversationStore,
    links: TabLinks,
  ) {
    this.tabs = new Tabs(links, {
      writes: (answer) => this.writerOf(answer) !== undefined,
      stop: (answer) => this.writerOf(answer)?.running.peek()!.stop(),
    });
  }

  load(): void {
    this.all.value = this.store.load().map((stored) => new Conversation(stored));
    for (const conversation of this.all.peek()) {
      for (const message of conversation.toStored().messages) this.watchOver(conversation, message);
    }
  }

  add(conversation: Conversation): void {
    this.all.value = [...this.all.peek(), conversation];
  }

  saveHeader(conversation: Conversation): void {
    conversation.mergeHeader(this.store.saveHeader(conversation.header.peek()));
  }

  /** Stores messages of a conversation, unless it was deleted meanwhile. */
  saveMessages(conversation: Conversation, ...messages: Message[]): void {
    if (!conversation.deleted.peek()) this.store.saveMessages(conversation.id, messages);
  }

  /** Deletes conversations. Other tabs then stop the answers that they write in these conversations. */
  remove(conversations: readonly Conversation[]): void {
    batch(() => {
      for (const conversation of conversations) {
        conversation.running.peek()?.stop();
        conversation.change(({ deleted }) => ({ deleted: changed(deleted, true) }));
        this.deletedHere.set(conversation, conversation.header.peek().deleted.at);
        this.saveHeader(conversation);
      }
    });
  }

  /** Undoes the deletion of conversations. */
  restore(conversations: readonly Conversation[]): void {
    batch(() => {
      for (const conversation of conversations) {
        conversation.change(({ deleted }) => ({ deleted: changed(deleted, false) }));
        this.saveMessages(conversation, ...conversation.toStored().messages);
        this.saveHeader(conversation);
      }
    });
  }

  /** Merges conversations, for example from a file, into the conversations of this browser, and stores the result. */
  merge(stored: readonly StoredConversation[]): void {
    for (const { header, messages } of stored) {
      const conversation = this.find(header.id) ?? this.create({ header, messages: [] });
      conversation.mergeHeader(header);
      conversation.add(messages.map(settled));
      if (conversation.deleted.peek()) this.restore([conversation]);
      this.store.save(conversation.toStored());
    }
  }

  /** Tells other tabs that this tab writes the answer, until the returned function is called. */
  hold(answer: string): () => void {
    return this.tabs.hold(answer);
  }

  /** Stops an answer that another tab writes. */
  stopElsewhere(answer: string): void {
    this.tabs.stop(answer);
  }

  /** Merges a header that another tab has stored. */
  adoptHeader(header: Header): void {
    const conversation = this.find(header.id);
    if (!conversation) {
      this.create({ header, messages: [] });
      return;
    }
    const wasDeleted = conversation.deleted.peek();
    conversation.mergeHeader(header);
    const deleted = conversation.deleted.peek();
    if (deleted) conversation.running.peek()?.stop();
    if (wasDeleted && !deleted) this.saveMessages(conversation, ...conversation.toStored().messages);
  }

  /** Merges a message that another tab has stored. If this tab's copy has progressed further, stores this copy. */
  adoptMessage(id: string, message: Message): void {
    const conversation = this.find(id) ?? this.create({ header: headerFor(id, message), messages: [] });
    if (conversation.running.peek()?.answer === message.id) return; // this tab writes it, so it has the newest copy
    const known = conversation.add([message])[0]!.peek();
    // This tab may have overwritten the reported copy with an older one before the report arrived. Therefore the merged
    // copy is compared with the copy in the storage and not with the reported one.
    const stored = this.store.message(id, message.id);
    if (!stored || compareProgress(known, stored) > 0) this.saveMessages(conversation, known);
    this.watchOver(conversation, known);
  }

  /**
   * Stores the unfinished answers of this tab, and makes its deletions final. Call this before the page closes. If
   * another tab has deleted the same conversation later, the messages stay, because that tab can undo its deletion.
   */
  close(): void {
    const final = [...this.deletedHere].filter(([{ header }, at]) => {
      const { deleted } = header.peek();
      return deleted.value && deleted.at === at;
    });
    this.store.removeMessages(new Set(final.map(([{ id }]) => id)));
    this.saveUnfinished(settled);
  }

  /** Stores the unfinished answers of this tab, each in the form that `as` gives it. */
  saveUnfinished(as: (answer: Message) => Message = (answer) => answer): void {
    for (const conversation of this.conversations.peek()) {
      const message = conversation.message(conversation.running.peek()?.answer ?? "");
      if (message) this.saveMessages(conversation, as(message.peek()));
    }
  }

  private find(id: string): Conversation | undefined {
    return this.all.peek().find((conversation) => conversation.id === id);
  }

  private create(stored: StoredConversation): Conversation {
    const conversation = new Conversation(stored);
    this.add(conversation);
    return conversation;
  }

  private writerOf(answer: string): Conversation | undefined {
    return this.all.peek().find((conversation) => conversation.running.peek()?.answer === answer);
  }

  /** Marks an unfinished answer as interrupted once no tab writes it any more. */
  private watchOver(conversation: Conversation, { id }: Message): void {
    const message = conversation.message(id)!;
    if (!isWritten(message) || this.watched.has(id)) return;
    this.watched.add(id);
    const check = async () => {
      if (isWritten(message) && (await this.tabs.isWritten(id))) {
        setTimeout(() => void check(), WATCH_MS);
        return;
      }
      this.watched.delete(id);
      if (!isWritten(message) || this.writerOf(id)) return;
      conversation.add([settled(message.peek())]);
      this.saveMessages(conversation, message.peek());
    };
    void check();
  }
}

function isWritten(message: Signal<Message>): boolean {
  const answer = message.peek();
  return answer.role === "assistant" && answer.state === "streaming";
}
