import type { Signal } from "@preact/signals";
import { ApiError, ConnectionError, ProtocolError } from "../api/errors";
import type { ChatPart } from "../api/wire";
import type { AssistantMessage, Message } from "./message";
import { FrameBatch } from "./frame-batch";
import { problemOf } from "./problem";

const MOST_TRIES = 6;
const LONGEST_WAIT_SECONDS = 60;
const SAVE_MS = 1_000; // an unfinished answer is stored this often, for other tabs and in case the page crashes

/** A received part that is added to an answer. */
export type AnswerPart =
  | Exclude<ChatPart, { kind: "left-out" }>
  /** The id of the first message that the model sees, if it does not see all. */
  | { kind: "memory"; start: string };

export interface Asking {
  /** Stores the part of the answer that has arrived. */
  save: (answer: AssistantMessage) => void;
  /** Sends the request; called again after each wait. */
  ask: () => AsyncIterable<AnswerPart>;
  /** Waits while the server is busy; rejects when `abort` fires. */
  wait: (seconds: number, error: ApiError) => Promise<void>;
  abort: AbortSignal;
}

/**
 * Writes a streamed answer into `target`, drawing once a frame, until it is complete, stopped or interrupted.
 * If the server is too busy to begin, the request is repeated. If a failure comes later, the request is not repeated,
 * because the person has begun to read.
 */
export async function writeAnswer(
  target: Signal<Message>,
  { ask, wait, save, abort }: Asking,
): Promise<AssistantMessage> {
  const beginning = target.peek() as AssistantMessage;
  let draft = beginning;
  let firstPartAt = 0;
  let savedAt = performance.now();
  const batch = new FrameBatch(() => {
    target.value = draft;
  });

  for (let tries = 1; draft.state === "streaming";) {
    try {
      for await (const part of ask()) {
        if (part.kind !== "memory") firstPartAt ||= performance.now();
        draft = withPart(draft, continued(part, beginning));
        if (part.kind === "usage") draft = { ...draft, seconds: (performance.now() - firstPartAt) / 1000 };
        batch.request();
        if (performance.now() - savedAt < SAVE_MS) continue;
        savedAt = performance.now();
        save(draft);
      }
      draft = { ...draft, state: "complete" };
    } catch (error) {
      const begun = firstPartAt > 0;
      const loading = error instanceof ApiError && error.code === "engine_unavailable";
      const again = error instanceof ApiError && error.isBusy && (loading || tries < MOST_TRIES) && !abort.aborted;
      // While no model is ready, tries are not counted: the page says that it waits, and the person can stop the wait.
      if (!loading) tries += 1;
      if (again && (await waited(wait(delay(error, tries), error)))) continue;
      if (abort.aborted) {
        draft = { ...draft, state: "stopped" };
      } else {
        if (!isExpected(error)) reportError(error);
        draft = { ...draft, state: "interrupted", problem: problemOf(error, begun) };
      }
    }
  }
  if (firstPartAt > 0) draft = { ...draft, seconds: (performance.now() - firstPartAt) / 1000 };
  batch.flush();
  return draft;
}

/** Counts the calls and characters of a part from the start of the whole answer, not from the start of the stream. */
function continued(part: AnswerPart, { content, toolEvents }: AssistantMessage): AnswerPart {
  if (part.kind !== "tool" || (content === "" && toolEvents.length === 0)) return part;
  const call_index = part.event.call_index + toolEvents.filter((event) => event.type === "call").length;
  if (part.event.type === "result") return { kind: "tool", event: { ...part.event, call_index } };
  return { kind: "tool", event: { ...part.event, call_index, offset: part.event.offset + Array.from(content).length } };
}

function withPart(draft: AssistantMessage, part: AnswerPart): AssistantMessage {
  switch (part.kind) {
    case "text":
      return { ...draft, content: draft.content + part.text };
    case "tool":
      return { ...draft, toolEvents: [...draft.toolEvents, part.event] };
    case "finish":
      return { ...draft, finishReason: part.reason };
    case "memory":
      return { ...draft, memoryStart: part.start };
    case "usage":
      return { ...draft, usage: part.usage };
  }
}

/** The wait in seconds: as long as the server asked for, else a time that doubles with each try; at most a minute. */
function delay(error: ApiError, tries: number): number {
  return Math.min(error.retryAfterSeconds ?? 2 ** (tries - 2), LONGEST_WAIT_SECONDS);
}

function waited(waiting: Promise<void>): Promise<boolean> {
  return waiting.then(
    () => true,
    () => false,
  );
}

function isExpected(error: unknown): boolean {
  return error instanceof ApiError || error instanceof ConnectionError || error instanceof ProtocolError;
}
