import { batch, computed, effect, signal, type ReadonlySignal, type Signal } from "@preact/signals";
import type { Api } from "../api/api";
import { ApiError, ConnectionError } from "../api/errors";
import { Health } from "../api/health";
import type { ModelInfo } from "../api/wire";
import type { ConversationStore } from "../storage/conversation-store";
import { sampling, type Settings } from "../storage/settings";
import { NO_LINKS, type TabLinks } from "../storage/tabs";
import { writeAnswer, type AnswerPart } from "./answer";
import { Busy } from "./busy";
import { Conversation } from "./conversation";
import { newestTurns, requestMessages, turnsOf } from "./history";
import { Library } from "./library";
import { changed } from "./merge";
import { assistantMessage, userMessage, type AssistantMessage, type Message } from "./message";
import { finishedEvents } from "./segments";
import { titleOf } from "./title";

const IMPATIENT_MS = 2_000; // if no part of an answer has arrived after this time, the page checks the server's health

export interface Toast {
  text: string;
  undo?: () => void;
}

/** The page's state and the person's actions. Components read the signals and call the methods. */
export class ChatApp {
  readonly library: Library;
  readonly conversations: ReadonlySignal<readonly Conversation[]>;
  /** The id of the open conversation; null while the open chat is new and has no message yet. */
  readonly activeId = signal<string | null>(null);
  readonly active: ReadonlySignal<Conversation | null>;
  readonly models = signal<readonly ModelInfo[]>([]);
  /** The id of the model that answers; empty until the server has named one. */
  readonly model: ReadonlySignal<string> = computed(() => {
    const ids = this.models.value.map((model) => model.id);
    return ids.includes(this.settings.value.model) ? this.settings.value.model : (ids[0] ?? "");
  });
  /** Counts the answers that this tab has asked for. */
  readonly asked = signal(0);
  readonly toast = signal<Toast | null>(null);
  /** The next announcement for screen readers. */
  readonly announcement = signal("");
  readonly settingsOpen = signal(false);
  readonly keyboardOpen = signal(false);
  readonly health: Health;
  readonly busy = new Busy();

  constructor(
    private readonly api: Api,
    readonly store: ConversationStore,
    readonly settings: Signal<Settings>,
    links: TabLinks = NO_LINKS,
  ) {
    this.health = new Health(api);
    this.library = new Library(store, links);
    this.conversations = this.library.conversations;
    this.active = computed(
      () => this.conversations.value.find((conversation) => conversation.id === this.activeId.value) ?? null,
    );
  }

  /** Loads the stored conversations and begins to watch the server. */
  start(): void {
    this.library.load();
    effect(() => {
      if (this.health.state.value !== "ready") return;
      void this.loadModels().catch(unlessExpected);
      this.busy.current.peek()?.retryNow();
    });
    void this.health.check();
  }

  send(text: string): void {
    const conversation = this.active.peek() ?? this.begin(text);
    if (conversation.writing.peek()) return;
    const question = userMessage(text, conversation.messages.peek().at(-1)?.peek().id ?? null);
    this.ask(conversation, question, assistantMessage(question.id));
  }

  /** Writes another version of an answer. */
  regenerate(conversation: Conversation, answer: Signal<Message>): void {
    this.ask(conversation, assistantMessage(answer.peek().parent));
  }

  /** Continues an answer that was cut off. The continued answer is another version of it. */
  continueAnswer(conversation: Conversation, answer: Signal<Message>): void {
    const { parent, content, toolEvents } = answer.peek() as AssistantMessage;
    this.ask(conversation, { ...assistantMessage(parent), content, toolEvents: finishedEvents(toolEvents) });
  }

  /** Asks another version of a question. */
  edit(conversation: Conversation, question: Signal<Message>, text: string): void {
    const { content, parent } = question.peek();
    const named = parent === null && conversation.title.peek() === titleOf(content);
    const edited = userMessage(text, parent);
    this.ask(conversation, edited, assistantMessage(edited.id));
    if (named) this.rename(conversation, titleOf(text));
  }

  /** Shows one version of a message instead of its other versions. */
  show(conversation: Conversation, version: Signal<Message>): void {
    conversation.choose(version.peek());
    this.library.saveHeader(conversation);
  }

  stop(conversation: Conversation): void {
    const running = conversation.running.peek();
    const last = conversation.messages.peek().at(-1)?.peek();
    if (running) running.stop();
    else if (last) this.library.stopElsewhere(last.id);
  }

  newChat(): void {
    this.activeId.value = null;
  }

  rename(conversation: Conversation, title: string): void {
    conversation.change((header) => ({ title: changed(header.title, title) }));
    this.library.saveHeader(conversation);
  }

  remove(conversation: Conversation): void {
    this.removeAll([conversation], "Conversation deleted.");
  }

  removeAll(
    conversations: readonly Conversation[] = this.conversations.peek(),
    text = "All conversations deleted.",
  ): void {
    const open = this.activeId.peek();
    this.library.remove(conversations);
    if (!this.active.value) this.activeId.value = null;
    this.toast.value = {
      text,
      undo: () => {
        this.library.restore(conversations);
        this.activeId.value = open;
      },
    };
  }

  private begin(text: string): Conversation {
    const conversation = Conversation.begin(text);
    batch(() => {
      this.library.add(conversation);
      this.activeId.value = conversation.id;
    });
    return conversation;
  }

  /** Adds messages, of which the last one is an answer to write, and shows them. */
  private ask(conversation: Conversation, ...messages: [Message, ...Message[]]): void {
    conversation.running.peek()?.stop();
    const controller = new AbortController();
    const release = this.library.hold(messages.at(-1)!.id);
    const added = batch(() => {
      conversation.change(() => ({ updatedAt: Date.now() }));
      conversation.running.value = { answer: messages.at(-1)!.id, stop: () => controller.abort() };
      this.asked.value += 1;
      return conversation.append(...messages);
    });
    this.library.saveMessages(conversation, ...added.map((message) => message.peek()));
    this.library.saveHeader(conversation);
    void this.answer(conversation, added.at(-1)!, controller.signal).finally(release);
  }

  private async answer(conversation: Conversation, answer: Signal<Message>, abort: AbortSignal) {
    const path = conversation.snapshot();
    // If the answer already has a beginning, the beginning is sent too, so that the model continues it.
    const history = answer.peek().content === "" ? path.slice(0, -1) : path;
    const save = (message: Message) => this.library.saveMessages(conversation, message);
    const finished = await writeAnswer(answer, {
      abort,
      save,
      ask: () => this.request(history, abort),
      wait: (seconds, error) => {
        if (error.status === 503) void this.health.check();
        return this.busy.wait(seconds, abort);
      },
    });
    if (conversation.running.peek()?.answer === finished.id) conversation.running.value = null;
    save(finished);
    if (finished.problem) void this.health.check();
    // Another model may have been promoted since the page was loaded, so the list of models is requested again.
    if (finished.problem?.kind === "rejected") void this.loadModels().catch(unlessExpected);
    if (this.active.peek() === conversation) this.announcement.value = spoken(finished);
  }

  private async *request(history: readonly Message[], abort: AbortSignal): AsyncGenerator<AnswerPart> {
    if (this.model.peek() === "") await this.loadModels();
    const settings = this.settings.peek();
    const turns = turnsOf(history);
    const sent = newestTurns(turns);
    const messages = requestMessages(sent, settings.systemPrompt);
    const request = { model: this.model.peek(), messages, truncation: "auto" as const, ...sampling(settings) };
    // While no model is ready, the server lets the request wait. The health check then shows what the server waits for.
    const impatient = setTimeout(() => void this.health.check(), IMPATIENT_MS);
    try {
      if (sent.length < turns.length) yield { kind: "memory", start: sent[0]!.id };
      for await (const part of this.api.chat(request, abort)) {
        clearTimeout(impatient);
        const start = part.kind === "left-out" && sent[part.turns]?.id;
        if (start) yield { kind: "memory", start };
        else if (part.kind !== "left-out") yield part;
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
  return answer.state === "stopped" ? "The answer was stopped." : ""; // a problem is announced by its own alert
}

/** Ignores a failed request, because the first question will show the problem. Throws all other errors. */
function unlessExpected(error: unknown): void {
  if (!(error instanceof ApiError || error instanceof ConnectionError)) throw error;
}
