import { signal } from "@preact/signals";

/** Places the conversation list beside the conversation, or over it as a drawer on a narrow screen. */
export class Layout {
  private readonly query = window.matchMedia("(max-width: 52rem)"); // the same width as in layout.css
  readonly narrow = signal(this.query.matches);
  readonly sidebarOpen = signal(!this.query.matches);

  constructor() {
    this.query.addEventListener("change", ({ matches }) => {
      this.narrow.value = matches;
      this.sidebarOpen.value = !matches;
    });
  }

  toggleSidebar(): void {
    this.sidebarOpen.value = !this.sidebarOpen.value;
  }

  /** Closes the drawer after a choice in it, so that the person sees the conversation. */
  closeDrawer(): void {
    if (this.narrow.value) this.sidebarOpen.value = false;
  }
}
