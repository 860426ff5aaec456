/**
 * How two copies of a conversation, of two tabs or of a tab and a file, become one.
 *
 * Each function below is the join of a semilattice: it is commutative, associative and idempotent. So all tabs reach
 * the same state, in whatever order and however often they hear of each other's changes (Shapiro et al., "Conflict-free
 * Replicated Data Types", 2011). Messages are only ever added, and an answer only goes forward: from "streaming" over
 * "interrupted" or "stopped" to "complete". Hence an answer that any tab has shown complete stays complete.
 */

import type { AnswerState, Message } from "./message";

/** A value of which the latest one counts. */
export interface Register<T> {
  value: T;
  /** Time of the change, in milliseconds since the epoch. */
  at: number;
}

/** What is stored of a conversation besides its messages. */
export interface Header {
  version: 2;
  id: string;
  createdAt: number;
  updatedAt: number;
  title: Register<string>;
  deleted: Register<boolean>;
  /** For the id of each message, the id of the version shown after it; "" is the place before the first message. */
  chosen: Record<string, Register<string>>;
}

export interface StoredConversation {
  header: Header;
  messages: Message[];
}

export function newHeader(id: string, title: string, now: number): Header {
  return {
    version: 2,
    id,
    createdAt: now,
    updatedAt: now,
    title: { value: title, at: now },
    deleted: { value: false, at: 0 },
    chosen: {},
  };
}

/** A change that is later than the one before it, even if the clock went back. */
export function changed<T>(before: Register<T> | undefined, value: T): Register<T> {
  return { value, at: Math.max(Date.now(), (before?.at ?? 0) + 1) };
}

/** Merges two headers of one conversation. Returns `a` itself if `b` adds nothing. */
export function mergeHeaders(a: Header, b: Header): Header {
  const chosen = { ...a.chosen };
  for (const [place, register] of Object.entries(b.chosen)) {
    const own = chosen[place];
    chosen[place] = own ? mergeRegisters(own, register) : register;
  }
  const merged: Header = {
    version: 2,
    id: a.id,
    createdAt: Math.min(a.createdAt, b.createdAt),
    updatedAt: Math.max(a.updatedAt, b.updatedAt),
    title: mergeRegisters(a.title, b.title),
    deleted: mergeRegisters(a.deleted, b.deleted),
    chosen,
  };
  return sameHeader(merged, a) ? a : merged;
}

/** Merges two copies of one message: the copy that has progressed further counts. */
export function mergeMessages(a: Message, b: Message): Message {
  return compareProgress(a, b) >= 0 ? a : b;
}

export function sameHeader(a: Header, b: Header): boolean {
  const places = Object.keys(a.chosen);
  return (
    a.createdAt === b.createdAt &&
    a.updatedAt === b.updatedAt &&
    sameRegister(a.title, b.title) &&
    sameRegister(a.deleted, b.deleted) &&
    places.length === Object.keys(b.chosen).length &&
    places.every((place) => sameRegister(a.chosen[place], b.chosen[place]))
  );
}

const PROGRESS: Record<AnswerState, number> = { streaming: 0, interrupted: 1, stopped: 2, complete: 3 };

/** Positive if `a` has progressed further than `b`. Only equal copies give 0, so the order of merges does not matter. */
export function compareProgress(a: Message, b: Message): number {
  if (a.role === "assistant" && b.role === "assistant") {
    const further =
      PROGRESS[a.state] - PROGRESS[b.state] ||
      a.content.length - b.content.length ||
      a.toolEvents.length - b.toolEvents.length;
    if (further !== 0) return further;
  }
  const [one, other] = [canonical(a), canonical(b)];
  return one.length - other.length || compare(one, other);
}

/** The message as text, whatever the order in which its fields were set. */
function canonical(message: Message): string {
  return JSON.stringify(Object.entries(message).sort(([a], [b]) => compare(a, b)));
}

function mergeRegisters<T extends string | boolean>(a: Register<T>, b: Register<T>): Register<T> {
  return (a.at - b.at || compare(a.value, b.value)) >= 0 ? a : b;
}

function sameRegister<T>(a: Register<T> | undefined, b: Register<T> | undefined): boolean {
  return a?.at === b?.at && a?.value === b?.value;
}

function compare<T extends string | boolean>(a: T, b: T): number {
  return a < b ? -1 : Number(a > b);
}
