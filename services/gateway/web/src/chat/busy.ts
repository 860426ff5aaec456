import { signal } from "@preact/signals";

export interface BusyWait {
  /** Time of the next attempt, in milliseconds since the epoch. */
  until: number;
  retryNow: () => void;
}

/** The wait before a request's next attempt at a busy server. The page shows it, and the person can end it. */
export class Busy {
  readonly current = signal<BusyWait | null>(null);

  /** Resolves after `seconds`, or earlier if the person asks for it. Rejects when `abort` fires. */
  wait(seconds: number, abort: AbortSignal): Promise<void> {
    return new Promise((resolve, reject) => {
      const done = (settle: () => void) => () => {
        clearTimeout(timer);
        abort.removeEventListener("abort", stop);
        if (this.current.peek() === wait) this.current.value = null;
        settle();
      };
      const retryNow = done(resolve);
      const stop = done(() => reject(abort.reason as Error));
      const timer = setTimeout(retryNow, seconds * 1000);
      const wait = { until: Date.now() + seconds * 1000, retryNow };
      abort.addEventListener("abort", stop);
      this.current.value = wait;
      if (abort.aborted) stop();
    });
  }
}
