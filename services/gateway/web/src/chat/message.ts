import type { ToolEvent, Usage } from "../api/wire";
import { newId } from "./id";
import type { Problem } from "./problem";

/**
 * The place of a message in its conversation, which is a tree: messages with the same parent are versions of each
 * other. A message is never moved, and it is removed only together with its deleted conversation, so that no tab can
 * destroy what another tab shows.
 */
interface Place {
  id: string;
  /** The id of the message before this one; null for the first message. */
  parent: string | null;
  /** When the message was begun, in milliseconds since the epoch. */
  createdAt: number;
}

export interface UserMessage extends Place {
  role: "user";
  content: string;
}

export type AnswerState = "streaming" | "interrupted" | "stopped" | "complete";

export interface AssistantMessage extends Place {
  role: "assistant";
  content: string;
  toolEvents: ToolEvent[];
  state: AnswerState;
  problem?: Problem;
  finishReason?: string;
  /** The id of the first message that the model saw, if the conversation was longer than its context. */
  memoryStart?: string;
  usage?: Usage;
  /** Seconds from the first part of the answer, a text or a tool event, to its end. */
  seconds?: number;
}

export type Message = UserMessage | AssistantMessage;

export function userMessage(content: string, parent: string | null = null): UserMessage {
  return { id: newId(), parent, createdAt: Date.now(), role: "user", content };
}

export function assistantMessage(parent: string | null = null): AssistantMessage {
  return {
    id: newId(),
    parent,
    createdAt: Date.now(),
    role: "assistant",
    content: "",
    toolEvents: [],
    state: "streaming",
  };
}

/** The message as it remains if the page is closed now: an unfinished answer becomes an interrupted one. */
export function settled(message: Message): Message {
  if (message.role === "user" || message.state !== "streaming") return message;
  return {
    ...message,
    state: "interrupted",
    problem: { kind: "interrupted", detail: "the page was closed before it was complete" },
  };
}
