import { signal, type Signal } from "@preact/signals";
import type { ToolEvent, Usage } from "../api/wire";
import { newId } from "./id";
import type { Problem } from "./problem";
import { titleOf } from "./title";

export interface UserMessage {
  id: string;
  role: "user";
  content: string;
}

export type AnswerState = "streaming" | "complete" | "stopped" | "interrupted";

export interface AssistantMessage {
  id: string;
  role: "assistant";
  content: string;
  toolEvents: ToolEvent[];
  state: AnswerState;
  problem?: Problem;
  finishReason?: string;
  usage?: Usage;
  /** Time from the first text to the end of the answer. */
  seconds?: number;
}

export type Message = UserMessage | AssistantMessage;

export function userMessage(content: string): UserMessage {
  return { id: newId(), role: "user", content };
}

export function assistantMessage(): AssistantMessage {
  return { id: newId(), role: "assistant", content: "", toolEvents: [], state: "streaming" };
}

/** The stored form of a conversation. */
export interface StoredConversation {
  version: 1;
  id: string;
  title: string;
  createdAt: number;
  updatedAt: number;
  messages: Message[];
}

/**
 * A conversation as the page shows it. Each message has its own signal, so that a token redraws
 * only the message that it belongs to.
 */
export class Conversation {
  readonly title: Signal<string>;
  readonly updatedAt: Signal<number>;
  readonly messages: Signal<readonly Signal<Message>[]>;
  /** Stops the answer that is being written, if there is one. */
  readonly running = signal<AbortController | null>(null);

  constructor(
    readonly id: string,
    readonly createdAt: number,
    stored: { title: string; updatedAt: number; messages: readonly Message[] },
  ) {
    this.title = signal(stored.title);
    this.updatedAt = signal(stored.updatedAt);
    this.messages = signal(stored.messages.map((message) => signal(message)));
  }

  /** A new conversation, named after its first message. */
  static begin(firstMessage: string): Conversation {
    const now = Date.now();
    return new Conversation(newId(), now, { title: titleOf(firstMessage), updatedAt: now, messages: [] });
  }

  static restore(stored: StoredConversation): Conversation {
    return new Conversation(stored.id, stored.createdAt, stored);
  }

  /** Takes over the state that another tab has stored. */
  replaceBy(stored: StoredConversation): void {
    this.title.value = stored.title;
    this.updatedAt.value = stored.updatedAt;
    this.messages.value = stored.messages.map((message) => signal(message));
  }

  snapshot(): Message[] {
    return this.messages.peek().map((message) => message.peek());
  }

  toStored(): StoredConversation {
    return {
      version: 1,
      id: this.id,
      title: this.title.peek(),
      createdAt: this.createdAt,
      updatedAt: this.updatedAt.peek(),
      messages: this.snapshot().map(settled),
    };
  }
}

/** Makes a stored answer "interrupted" instead of "streaming", because no connection continues it. */
function settled(message: Message): Message {
  if (message.role === "user" || message.state !== "streaming") return message;
  return {
    ...message,
    state: "interrupted",
    problem: { kind: "interrupted", detail: "the page was closed before it was complete" },
  };
}
