/**
 * Merges two copies of a conversation, which come from two tabs or from a tab and a file.
 *
 * Each merge function is the join of a semilattice: it is commutative, associative and idempotent. So all tabs reach
 * the same state, in whatever order and however often they receive each other's changes (Shapiro et al., "Conflict-free
 * Replicated Data Types", 2011). Messages are only ever added, and the state of an answer only moves forward: from
 * "streaming" to "interrupted" or "stopped", and then to "complete". So an answer that any tab has shown as complete
 * stays complete.
 */

import type { AnswerState, Message } from "./message";

/** A value with the time of its last change. A merge keeps the later of two values. */
export interface Register<T> {
  value: T;
  /** Time of the change, in milliseconds since the epoch. */
  at: number;
}

/** The stored data of a conversation besides its messages. */
export interface Header {
  version: 2;
  id: string;
  createdAt: number;
  updatedAt: number;
  title: Register<string>;
  deleted: Register<boolean>;
  /** Maps the id of a message to the id of the version that is shown after it; "" stands for the first place. */
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

/** A register with the new value. Its time is later than the time of `before`, even if the clock went back. */
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

/** Merges two copies of one message: the result is the copy that has progressed further. */
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

/** The message as text. The text does not depend on the order in which the fields were set. */
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
