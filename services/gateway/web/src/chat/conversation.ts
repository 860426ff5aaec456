import { computed, signal, type ReadonlySignal, type Signal } from "@preact/signals";
import { newId } from "./id";
import { changed, mergeHeaders, mergeMessages, newHeader, type Header, type StoredConversation } from "./merge";
import type { AssistantMessage, Message } from "./message";
import { titleOf } from "./title";

/** For each place in the tree, all messages there in the order of their creation; see `placeOf`. */
type Versions = ReadonlyMap<string, readonly Signal<Message>[]>;

/** The answer that this tab writes. */
export interface Running {
  /** The answer's id. */
  answer: string;
  stop: () => void;
}

/**
 * A conversation as the page shows it: one path through the tree of its messages. Each message has its own signal, so
 * that a token redraws only the message that it belongs to.
 */
export class Conversation {
  readonly id: string;
  readonly header: Signal<Header>;
  readonly title: ReadonlySignal<string>;
  readonly updatedAt: ReadonlySignal<number>;
  readonly deleted: ReadonlySignal<boolean>;
  /** The shown messages, from the first one to the last one. */
  readonly messages: ReadonlySignal<readonly Signal<Message>[]>;
  /** The id of the first message that the model saw when it wrote the last answer; undefined if it saw all. */
  readonly memoryStart: ReadonlySignal<string | undefined>;
  readonly running = signal<Running | null>(null);
  /** Whether this tab writes an answer, or another tab writes the answer that is shown last. */
  readonly writing: ReadonlySignal<boolean>;
  private readonly byId = new Map<string, Signal<Message>>();
  private readonly versions = signal<Versions>(new Map());

  constructor({ header, messages }: StoredConversation) {
    this.id = header.id;
    this.header = signal(header);
    this.title = computed(() => this.header.value.title.value);
    this.updatedAt = computed(() => this.header.value.updatedAt);
    this.deleted = computed(() => this.header.value.deleted.value);
    this.add(messages);
    let shown: readonly Signal<Message>[] = [];
    this.messages = computed(() => {
      const path = this.path();
      if (path.length !== shown.length || path.some((message, index) => message !== shown[index])) shown = path;
      return shown; // the same array while the path is unchanged, so that nothing is drawn again
    });
    this.memoryStart = computed(() => {
      for (const message of this.messages.value.toReversed()) {
        const { role, content, memoryStart } = message.value as AssistantMessage;
        if (role === "assistant" && (memoryStart !== undefined || content !== "")) return memoryStart;
      }
      return undefined;
    });
    this.writing = computed(() => {
      const last = this.messages.value.at(-1)?.value;
      return this.running.value !== null || (last?.role === "assistant" && last.state === "streaming");
    });
  }

  /** A new conversation, named after its first message. */
  static begin(firstMessage: string): Conversation {
    return new Conversation({ header: newHeader(newId(), titleOf(firstMessage), Date.now()), messages: [] });
  }

  message(id: string): Signal<Message> | undefined {
    return this.byId.get(id);
  }

  /** The versions of a message that are not empty, and the shown version even if it is empty. */
  versionsOf(message: Signal<Message>): readonly Signal<Message>[] {
    const all = this.versions.value.get(placeOf(message.value)) ?? [];
    const kept = all.filter((version) => version === message || !isEmpty(version.value));
    return kept.length === all.length ? all : kept;
  }

  /** Adds messages and returns their signals. A copy of a known message is merged into it. */
  add(messages: readonly Message[]): Signal<Message>[] {
    const added = new Set<string>();
    const result = messages.map((message) => {
      const known = this.byId.get(message.id);
      if (known) {
        known.value = mergeMessages(known.peek(), message);
        return known;
      }
      const fresh = signal(message);
      this.byId.set(message.id, fresh);
      added.add(placeOf(message));
      return fresh;
    });
    if (added.size > 0) this.sortVersions(added);
    return result;
  }

  /** Adds messages that this tab has begun, and shows them; the first one becomes the last version of its place. */
  append(first: Message, ...others: Message[]): Signal<Message>[] {
    const latest = this.versions.peek().get(placeOf(first))?.at(-1)?.peek();
    const createdAt = Math.max(first.createdAt, (latest?.createdAt ?? 0) + 1);
    const added = this.add([{ ...first, createdAt }, ...others]);
    if (latest) this.choose(first);
    return added;
  }

  /** Shows this version of a message instead of the other versions. */
  choose(message: Message): void {
    const place = placeOf(message);
    this.change(({ chosen }) => ({ chosen: { ...chosen, [place]: changed(chosen[place], message.id) } }));
  }

  /** Merges the header of another copy of the conversation. */
  mergeHeader(header: Header): void {
    this.header.value = mergeHeaders(this.header.peek(), header);
  }

  change(of: (header: Header) => Partial<Header>): void {
    const header = this.header.peek();
    this.header.value = { ...header, ...of(header) };
  }

  /** The shown messages as plain values instead of signals. */
  snapshot(): Message[] {
    return this.messages.peek().map((message) => message.peek());
  }

  toStored(): StoredConversation {
    return { header: this.header.peek(), messages: [...this.byId.values()].map((message) => message.peek()) };
  }

  private path(): Signal<Message>[] {
    const path: Signal<Message>[] = [];
    for (let place = ""; ;) {
      const versions = this.versions.value.get(place);
      if (!versions) return path;
      const chosen = this.header.value.chosen[place]?.value;
      const shown = versions.find((version) => version.peek().id === chosen) ?? versions.at(-1)!;
      path.push(shown);
      place = shown.peek().id;
    }
  }

  private sortVersions(places: ReadonlySet<string>): void {
    const versions = new Map(this.versions.peek());
    for (const place of places) versions.set(place, []);
    for (const message of this.byId.values()) {
      const place = placeOf(message.peek());
      if (places.has(place)) versions.set(place, [...versions.get(place)!, message]);
    }
    for (const place of places) versions.set(place, [...versions.get(place)!].sort(byAge));
    this.versions.value = versions;
  }
}

/** The place that all versions of a message share in the tree: the id of the message before it, or "" for the first. */
function placeOf(message: Message): string {
  return message.parent ?? "";
}

function byAge(a: Signal<Message>, b: Signal<Message>): number {
  const [one, other] = [a.peek(), b.peek()];
  return one.createdAt - other.createdAt || (one.id < other.id ? -1 : 1);
}

function isEmpty(message: Message): boolean {
  return (
    message.role === "assistant" &&
    message.state !== "streaming" &&
    message.content === "" &&
    message.toolEvents.length === 0
  );
}
