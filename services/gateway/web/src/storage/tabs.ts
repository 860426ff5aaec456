import { newId } from "../chat/id";

const REPLY_MS = 1_500; // without locks, a tab that replies later counts as closed

/** The part of a BroadcastChannel that this file needs. */
export interface Channel {
  postMessage: (message: unknown) => void;
  onmessage: ((event: MessageEvent) => unknown) | null;
}

/** The part of the browser's `LockManager` that this file needs. */
export interface Locks {
  /** Calls `hold` once no other tab has the lock. The tab has the lock until the promise of `hold` settles. */
  request: (name: string, hold: () => Promise<void>) => Promise<unknown>;
  query: () => Promise<{ held?: { name?: string }[] }>;
}

/** What connects the tabs of this page. A part is null if the browser does not have it. */
export interface TabLinks {
  channel: Channel | null;
  locks: Locks | null;
}

export const NO_LINKS: TabLinks = { channel: null, locks: null };

type Said =
  | { kind: "who-writes"; answer: string; question: string }
  | { kind: "i-write"; question: string }
  | { kind: "stop"; answer: string };

export interface Own {
  /** Whether this tab writes the answer. */
  writes: (answer: string) => boolean;
  /** Stops the answer if this tab writes it. */
  stop: (answer: string) => void;
}

/**
 * Tells whether another tab writes an answer, and asks it to stop.
 *
 * The tab that writes an answer holds a lock with the answer's id. The browser releases the lock when the tab is closed
 * or crashes, and only then. A tab that is busy, or whose timers the browser slows down, thus still counts as writing.
 * Browsers offer locks only to pages with HTTPS and to pages of this machine. Elsewhere, for example at
 * `http://192.168.0.2`, the tabs ask each other, and a tab that does not reply in time counts as closed. The other tabs
 * then show its answer as interrupted, until the answer is complete. A tab without locks and without a channel acts as
 * if it were the only tab.
 */
export class Tabs {
  private readonly replies = new Map<string, () => void>();
  private readonly channel: Channel | null;
  private readonly locks: Locks | null;

  constructor(
    links: TabLinks,
    private readonly own: Own,
  ) {
    this.channel = links.channel;
    this.locks = links.locks;
    if (this.channel) this.channel.onmessage = ({ data }: MessageEvent<Said>) => this.hear(data);
  }

  /** Tells all tabs that this tab writes the answer, until the returned function is called. */
  hold(answer: string): () => void {
    let release: () => void = () => undefined;
    const written = new Promise<void>((resolve) => (release = resolve));
    // A browser may refuse a lock, for example to a page without a storage. Other tabs then ask this one.
    this.locks?.request(lockOf(answer), () => written).catch(() => undefined);
    return release;
  }

  /** Whether another tab is writing the answer. */
  async isWritten(answer: string): Promise<boolean> {
    // The stored answer may become known before its lock. Therefore a missing lock is not enough, and is looked up again.
    return (await this.isLocked(answer)) || (await this.ask(answer)) || (await this.isLocked(answer));
  }

  /** Asks the tab that writes the answer to stop it. */
  stop(answer: string): void {
    this.say({ kind: "stop", answer });
  }

  private async isLocked(answer: string): Promise<boolean> {
    const { held } = (await this.locks?.query().catch(() => null)) ?? {};
    return held?.some(({ name }) => name === lockOf(answer)) ?? false;
  }

  private ask(answer: string): Promise<boolean> {
    if (!this.channel) return Promise.resolve(false);
    const question = newId();
    return new Promise((resolve) => {
      const finish = (written: boolean) => {
        clearTimeout(timer);
        this.replies.delete(question);
        resolve(written);
      };
      const timer = setTimeout(() => finish(false), REPLY_MS);
      this.replies.set(question, () => finish(true));
      this.say({ kind: "who-writes", answer, question });
    });
  }

  private hear(said: Said): void {
    if (said.kind === "stop") this.own.stop(said.answer);
    else if (said.kind === "i-write") this.replies.get(said.question)?.();
    else if (this.own.writes(said.answer)) this.say({ kind: "i-write", question: said.question });
  }

  private say(said: Said): void {
    this.channel?.postMessage(said);
  }
}

function lockOf(answer: string): string {
  return `nanochat.answer.${answer}`;
}

/** The links between tabs that this browser offers. A browser that blocks the storage may block the channel too. */
export function browserLinks(): TabLinks {
  const { locks } = navigator as { locks?: Locks };
  return { channel: browserChannel(), locks: locks ?? null };
}

function browserChannel(): Channel | null {
  try {
    return new BroadcastChannel("nanochat");
  } catch {
    return null;
  }
}
