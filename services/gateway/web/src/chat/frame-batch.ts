/** Calls `apply` at most once a frame. A hidden page draws no frames, so it calls `apply` at each request. */
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
