import type { Signal } from "@preact/signals";
import { ApiError, ConnectionError, ProtocolError } from "../api/errors";
import type { ChatPart } from "../api/wire";
import type { AssistantMessage, Message } from "./conversation";
import { FrameBatch } from "./frame-batch";
import { problemOf } from "./problem";

const MOST_TRIES = 6;
const LONGEST_WAIT_SECONDS = 60;

export interface Asking {
  /** Sends the request; called again after each wait. */
  ask: () => AsyncIterable<ChatPart>;
  /** Waits while the server is busy; rejects when `abort` fires. */
  wait: (seconds: number, error: ApiError) => Promise<void>;
  abort: AbortSignal;
}

/**
 * Writes a streamed answer into `target`, drawing once a frame, until it is complete, stopped or interrupted.
 * If the server is too busy to begin, the request is repeated. After a later failure it is not, because the person has
 * begun to read.
 */
export async function writeAnswer(target: Signal<Message>, { ask, wait, abort }: Asking): Promise<AssistantMessage> {
  let draft = target.peek() as AssistantMessage;
  let firstPartAt = 0;
  const batch = new FrameBatch(() => {
    target.value = draft;
  });

  for (let tries = 1; draft.state === "streaming"; tries += 1) {
    try {
      for await (const part of ask()) {
        firstPartAt ||= performance.now();
        draft = withPart(draft, part);
        batch.request();
      }
      draft = { ...draft, state: "complete" };
    } catch (error) {
      const begun = draft.content !== "" || draft.toolEvents.length > 0;
      const again = tries < MOST_TRIES && error instanceof ApiError && error.isBusy && !abort.aborted;
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

function withPart(draft: AssistantMessage, part: ChatPart): AssistantMessage {
  switch (part.kind) {
    case "text":
      return { ...draft, content: draft.content + part.text };
    case "tool":
      return { ...draft, toolEvents: [...draft.toolEvents, part.event] };
    case "finish":
      return { ...draft, finishReason: part.reason };
    case "usage":
      return { ...draft, usage: part.usage };
  }
}

/** The wait that the server asked for; otherwise the wait doubles each time. */
function delay(error: ApiError, tries: number): number {
  return Math.min(error.retryAfterSeconds ?? 2 ** (tries - 1), LONGEST_WAIT_SECONDS);
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
