import { signal } from "@preact/signals";
import { isRunning, type Progress } from "./progress";

const SOON_MS = 2_000; // pause between checks while a training runs, its model is loaded, or no model exists
const LATER_MS = 30_000;
const LONGEST_RETRY_MS = 8_000; // after each failed check in a row, the pause doubles up to this time

interface Options {
  apiKey?: () => string;
  /** Whether the server has no model yet, so that a training may begin at any time. */
  waiting?: () => boolean;
  /** Whether nobody can see the page. No check then begins by itself; call `check` when the page is visible again. */
  hidden?: () => boolean;
  /** Called when the served revision changes. */
  onServed?: () => void;
}

/** Follows the training of the model. A page that is opened during a run shows the run from its beginning. */
export class TrainingWatch {
  /** Null until the server has reported the progress of a training. */
  readonly progress = signal<Progress | null>(null);
  /** Whether the training has run while this page was open. If not, the page need not show its end. */
  readonly seenRunning = signal(false);
  private timer: ReturnType<typeof setTimeout> | undefined;
  private stopped = false;
  private failures = 0;

  constructor(
    private readonly base: string,
    private readonly options: Options = {},
  ) {}

  /** Asks the server now, and from then on repeatedly. */
  async check(): Promise<void> {
    clearTimeout(this.timer);
    const before = this.progress.peek();
    const found = await this.ask();
    if (this.stopped) return;
    if (found) {
      this.progress.value = found;
      if (isRunning(found)) this.seenRunning.value = true;
      if (found.served !== (before?.served ?? null)) this.options.onServed?.();
    }
    clearTimeout(this.timer);
    const known = this.progress.peek();
    // After the promotion, the page still checks often, because the engine takes a moment to serve the promoted model.
    const changing = this.seenRunning.peek() && known?.served !== known?.promoted;
    const soon = known ? isRunning(known) || changing : (this.options.waiting?.() ?? false);
    const retry = Math.min(SOON_MS * 2 ** Math.max(this.failures - 1, 0), LONGEST_RETRY_MS);
    this.timer = setTimeout(
      () => {
        if (!this.options.hidden?.()) void this.check();
      },
      soon ? retry : LATER_MS,
    );
  }

  stop(): void {
    this.stopped = true;
    clearTimeout(this.timer);
  }

  /** The progress; null if the server has none or does not answer. */
  private async ask(): Promise<Progress | null> {
    const key = this.options.apiKey?.() ?? "";
    try {
      const response = await fetch(new URL("progress", this.base), {
        cache: "no-store",
        headers: key ? { authorization: `Bearer ${key}` } : {},
        signal: AbortSignal.timeout(10_000),
      });
      const found = response.ok ? ((await response.json()) as Progress) : null;
      this.failures = response.status >= 500 ? this.failures + 1 : 0;
      return found;
    } catch {
      this.failures += 1;
      return null; // the page's health check says what is wrong
    }
  }
}
