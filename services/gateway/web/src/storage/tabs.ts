import { newId } from "../chat/id";

const REPLY_MS = 1_500; // a tab in the background may take a moment to reply

/** The part of a BroadcastChannel that this file needs. */
export interface Channel {
  postMessage: (message: unknown) => void;
  onmessage: ((event: MessageEvent) => unknown) | null;
}

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

/** Messages between the tabs of this page: the question which tab writes an answer, and the request to stop it. */
export class Tabs {
  private readonly replies = new Map<string, () => void>();

  /** `channel` is null if the browser has none. This tab then acts as if it were the only tab. */
  constructor(
    private readonly channel: Channel | null,
    private readonly own: Own,
  ) {
    if (channel) channel.onmessage = ({ data }: MessageEvent<Said>) => this.hear(data);
  }

  /** Whether another tab is writing the answer. */
  isWritten(answer: string): Promise<boolean> {
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

  /** Asks the tab that writes the answer to stop it. */
  stop(answer: string): void {
    this.say({ kind: "stop", answer });
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

/** The channel between the tabs of this page. A browser that blocks the storage may block the channel too. */
export function browserChannel(): Channel | null {
  try {
    return new BroadcastChannel("nanochat");
  } catch {
    return null;
  }
}
