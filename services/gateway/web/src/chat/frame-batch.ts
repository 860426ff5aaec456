/** Calls `apply` at most once a frame, however often it is asked to. A hidden page draws no frames: there it is at once. */
export class FrameBatch {
  private frame = 0;

  constructor(private readonly apply: () => void) {}

  request(): void {
    if (document.hidden) this.flush();
    else this.frame ||= requestAnimationFrame(() => this.flush());
  }

  flush(): void {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.apply();
  }
}
