import { signal } from "@preact/signals";
import type { Api } from "./api";
import { ConnectionError } from "./errors";

export type ServerState = "unknown" | "ready" | "loading" | "unreachable";

const CALM_MS = 30_000; // pause between checks while the server answers; a chat request would notice a problem first
const WORRIED_MS = 2_000; // pause between checks while there is a problem; short, so the page soon shows the recovery

/** Watches whether the server can answer. */
export class Health {
  readonly state = signal<ServerState>("unknown");
  /** The server's text about what it waits for while its state is "loading"; null if it sends none. */
  readonly waitsFor = signal<string | null>(null);
  private timer: ReturnType<typeof setTimeout> | undefined;
  private stopped = false;

  constructor(private readonly api: Pick<Api, "readiness">) {}

  /** Checks immediately, and from then on repeatedly until `stop` is called. */
  async check(): Promise<ServerState> {
    clearTimeout(this.timer);
    this.state.value = await this.ask();
    clearTimeout(this.timer);
    if (this.stopped) return this.state.value;
    this.timer = setTimeout(() => void this.check(), this.state.value === "ready" ? CALM_MS : WORRIED_MS);
    return this.state.value;
  }

  stop(): void {
    this.stopped = true;
    clearTimeout(this.timer);
  }

  private async ask(): Promise<ServerState> {
    try {
      const { status, waitsFor } = await this.api.readiness();
      this.waitsFor.value = waitsFor;
      if (status === 503 || waitsFor !== null) return "loading";
      // 502 and 504 come from a proxy that finds no server behind it.
      return status === 502 || status === 504 ? "unreachable" : "ready";
    } catch (error) {
      if (error instanceof ConnectionError) return "unreachable";
      throw error;
    }
  }
}
