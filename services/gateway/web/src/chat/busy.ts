import { signal } from "@preact/signals";

export interface BusyWait {
  /** When the next try begins, in milliseconds since the epoch. */
  until: number;
  retryNow: () => void;
}

/** The wait of a request that the server has put off. The page shows it and can cut it short. */
export class Busy {
  readonly current = signal<BusyWait | null>(null);

  /** Resolves after `seconds` or when the person asks for it earlier. Rejects when `abort` fires. */
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
