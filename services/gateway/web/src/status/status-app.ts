import { signal, type Signal } from "@preact/signals";
import { ApiError, ConnectionError } from "../api/errors";
import { loadStatus, type Status } from "../api/status";

const POLL_MS = 2_000;

/** Numbers of tokens per second that this gateway sends to engines and receives from them now. */
export interface Rates {
  prompt: number;
  generation: number;
}

/** Reads the status again and again while the page is visible. */
export class StatusApp {
  readonly status = signal<Status | null>(null);
  readonly rates = signal<Rates | null>(null);
  /** Why there is no current status; null if there is one. */
  readonly problem = signal<"key" | "unreachable" | "failed" | null>(null);
  private timer: ReturnType<typeof setTimeout> | undefined;
  private readAt = 0;
  private stopped = false;

  constructor(
    private readonly base: string,
    readonly key: Signal<string>,
    private readonly load: typeof loadStatus = loadStatus,
  ) {}

  async read(): Promise<void> {
    clearTimeout(this.timer);
    this.stopped = false;
    const key = this.key.peek();
    if (key === "") {
      this.problem.value = "key";
      return;
    }
    try {
      const status = await this.load(this.base, key);
      if (key !== this.key.peek()) return; // another key was entered meanwhile, and a newer call reads with that key
      const now = performance.now();
      const before = this.status.peek();
      if (before) this.rates.value = ratesBetween(before, status, (now - this.readAt) / 1000);
      this.readAt = now;
      this.status.value = status;
      this.problem.value = null;
    } catch (error) {
      if (key !== this.key.peek()) return;
      this.problem.value = problemOf(error);
      if (this.problem.value === "key") {
        this.status.value = null;
        return;
      }
    }
    clearTimeout(this.timer);
    if (!this.stopped) this.timer = setTimeout(() => void this.read(), POLL_MS);
  }

  /** Reads no more until the next call of `read`. */
  stop(): void {
    this.stopped = true;
    clearTimeout(this.timer);
  }
}

/** The rates between two readings; null if a counter has fallen, as after a restart of the gateway. */
export function ratesBetween({ gateway: a }: Status, { gateway: b }: Status, seconds: number): Rates | null {
  const prompt = (b.prompt_tokens - a.prompt_tokens) / seconds;
  const generation = (b.generation_tokens - a.generation_tokens) / seconds;
  return prompt < 0 || generation < 0 ? null : { prompt, generation };
}

function problemOf(error: unknown): "key" | "unreachable" | "failed" {
  if (error instanceof ConnectionError) return "unreachable";
  if (!(error instanceof ApiError)) throw error;
  return error.status === 401 || error.status === 403 ? "key" : "failed";
}
