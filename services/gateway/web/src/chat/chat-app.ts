import { batch, computed, effect, signal, type ReadonlySignal, type Signal } from "@preact/signals";
import type { Api } from "../api/api";
import { ApiError, ConnectionError } from "../api/errors";
import { Health } from "../api/health";
import type { ChatPart, ModelInfo } from "../api/wire";
import type { ConversationStore } from "../storage/conversation-store";
import { sampling, type Settings } from "../storage/settings";
import { writeAnswer } from "./answer";
import { Busy } from "./busy";
import {
  assistantMessage,
  Conversation,
  userMessage,
  type AssistantMessage,
  type Message,
  type StoredConversation,
} from "./conversation";
import { requestMessages } from "./history";
import { titleOf } from "./title";

const IMPATIENT_MS = 2_000; // time without a first word after which the page asks how the server is

export interface Toast {
  text: string;
  undo?: () => void;
}

/** The page's state and the person's actions. Components read the signals and call the methods. */
export class ChatApp {
  readonly conversations = signal<readonly Conversation[]>([]);
  /** Null while the open chat is new and has no message yet. */
  readonly activeId = signal<string | null>(null);
  readonly active: ReadonlySignal<Conversation | null> = computed(
    () => this.conversations.value.find((conversation) => conversation.id === this.activeId.value) ?? null,
  );
  readonly models = signal<readonly ModelInfo[]>([]);
  /** The id of the model that answers; empty until the server has named one. */
  readonly model: ReadonlySignal<string> = computed(() => {
    const ids = this.models.value.map((model) => model.id);
    return ids.includes(this.settings.value.model) ? this.settings.value.model : (ids[0] ?? "");
  });
  readonly toast = signal<Toast | null>(null);
  /** The next announcement for screen readers. */
  readonly announcement = signal("");
  readonly settingsOpen = signal(false);
  readonly health: Health;
  readonly busy = new Busy();

  constructor(
    private readonly api: Api,
    readonly store: ConversationStore,
    readonly settings: Signal<Settings>,
  ) {
    this.health = new Health(api);
  }

  /** Loads the stored conversations and begins to watch the server. */
  start(): void {
    this.conversations.value = this.store.load().map((stored) => Conversation.restore(stored));
    effect(() => {
      if (this.health.state.value !== "ready") return;
      void this.loadModels().catch(unlessExpected);
      this.busy.current.peek()?.retryNow();
    });
    void this.health.check();
  }

  send(text: string): void {
    const conversation = this.active.peek() ?? this.begin(text);
    if (conversation.running.peek()) return;
    this.ask(conversation, [...conversation.messages.peek(), signal<Message>(userMessage(text))]);
  }

  /** Replaces `answer` and all messages after it with a new answer. */
  regenerate(conversation: Conversation, answer: Signal<Message>): void {
    const messages = conversation.messages.peek();
    this.ask(conversation, messages.slice(0, messages.indexOf(answer)));
  }

  /** Changes the words of an earlier question and asks it again; the messages after it are removed. */
  edit(conversation: Conversation, question: Signal<Message>, text: string): void {
    const before = conversation.messages.peek();
    const index = before.indexOf(question);
    const title = conversation.title.peek();
    this.ask(conversation, [...before.slice(0, index), signal<Message>(userMessage(text))]);
    if (index === 0 && title === titleOf(question.peek().content)) this.rename(conversation, titleOf(text));
    const lost = before.length - index - 2;
    if (lost <= 0) return;
    this.toast.value = {
      text: "The messages after this one were removed.",
      undo: () => {
        this.stop(conversation);
        conversation.messages.value = before;
        this.rename(conversation, title);
      },
    };
  }

  stop(conversation: Conversation): void {
    conversation.running.peek()?.abort();
  }

  newChat(): void {
    this.activeId.value = null;
  }

  rename(conversation: Conversation, title: string): void {
    conversation.title.value = title;
    this.store.save(conversation);
  }

  remove(conversation: Conversation): void {
    this.removeAll([conversation], "Conversation deleted.");
  }

  removeAll(
    conversations: readonly Conversation[] = this.conversations.peek(),
    text = "All conversations deleted.",
  ): void {
    const open = this.activeId.peek();
    batch(() => {
      for (const conversation of conversations) {
        this.stop(conversation);
        this.store.remove(conversation.id);
      }
      this.conversations.value = this.conversations.value.filter((other) => !conversations.includes(other));
      if (!this.active.value) this.activeId.value = null;
    });
    this.toast.value = {
      text,
      undo: () => {
        this.conversations.value = [...this.conversations.value, ...conversations];
        for (const conversation of conversations) this.store.save(conversation);
        this.activeId.value = open;
      },
    };
  }

  /** Applies a change of another tab, unless an answer is being written here. */
  adopt(id: string, stored: StoredConversation | null): void {
    const known = this.conversations.peek().find((conversation) => conversation.id === id);
    if (known?.running.peek()) return;
    if (!stored) this.conversations.value = this.conversations.value.filter((conversation) => conversation !== known);
    else if (known) known.replaceBy(stored);
    else this.conversations.value = [...this.conversations.value, Conversation.restore(stored)];
  }

  /** Stores the unfinished answers before the page closes. */
  saveRunning(): void {
    for (const conversation of this.conversations.peek()) {
      if (conversation.running.peek()) this.store.save(conversation);
    }
  }

  private begin(text: string): Conversation {
    const conversation = Conversation.begin(text);
    batch(() => {
      this.conversations.value = [...this.conversations.value, conversation];
      this.activeId.value = conversation.id;
    });
    return conversation;
  }

  /** Sets the messages, of which the last one is a question, and requests its answer. */
  private ask(conversation: Conversation, messages: readonly Signal<Message>[]): void {
    this.stop(conversation);
    const answer = signal<Message>(assistantMessage());
    const controller = new AbortController();
    batch(() => {
      conversation.messages.value = [...messages, answer];
      conversation.updatedAt.value = Date.now();
      conversation.running.value = controller;
    });
    this.store.save(conversation);
    void this.answer(conversation, answer, controller);
  }

  private async answer(conversation: Conversation, answer: Signal<Message>, controller: AbortController) {
    const abort = controller.signal;
    const history = conversation.snapshot().slice(0, -1);
    const finished = await writeAnswer(answer, {
      abort,
      ask: () => this.request(history, abort),
      wait: (seconds, error) => {
        if (error.status === 503) void this.health.check();
        return this.busy.wait(seconds, abort);
      },
    });
    if (conversation.running.peek() === controller) conversation.running.value = null;
    if (this.conversations.peek().includes(conversation)) this.store.save(conversation);
    if (finished.problem) void this.health.check();
    // Another model may have been promoted since the page was loaded.
    if (finished.problem?.kind === "rejected") void this.loadModels().catch(unlessExpected);
    if (this.active.peek() === conversation) this.announcement.value = spoken(finished);
  }

  private async *request(history: readonly Message[], abort: AbortSignal): AsyncGenerator<ChatPart> {
    if (this.model.peek() === "") await this.loadModels();
    const settings = this.settings.peek();
    const messages = requestMessages(history, settings.systemPrompt);
    // While no model is ready, the server lets the request wait. The check finds out what it waits for.
    const impatient = setTimeout(() => void this.health.check(), IMPATIENT_MS);
    try {
      for await (const part of this.api.chat({ model: this.model.peek(), messages, ...sampling(settings) }, abort)) {
        clearTimeout(impatient);
        yield part;
      }
    } finally {
      clearTimeout(impatient);
    }
  }

  private async loadModels(): Promise<void> {
    this.models.value = await this.api.models();
  }
}

function spoken(answer: AssistantMessage): string {
  if (answer.state === "complete") return `Answer: ${answer.content}`;
  return answer.state === "stopped" ? "The answer was stopped." : ""; // a problem has its own alert
}

/** Ignores a failure, because the first question will show it. */
function unlessExpected(error: unknown): void {
  if (!(error instanceof ApiError || error instanceof ConnectionError)) throw error;
}
