import { effect, signal, type Signal } from "@preact/signals";

export type Theme = "system" | "light" | "dark";

const KEY = "nanochat.theme";

/** The chosen theme, which is stored and applied to the page. public/theme.js applies it before the first paint. */
export function storedTheme(storage: Storage | null, root: HTMLElement): Signal<Theme> {
  const stored = storage?.getItem(KEY);
  const theme = signal<Theme>(stored === "light" || stored === "dark" ? stored : "system");
  effect(() => {
    if (theme.value === "system") delete root.dataset.theme;
    else root.dataset.theme = theme.value;
    try {
      storage?.setItem(KEY, theme.value);
    } catch (error) {
      // If the storage is full, the theme lasts until the page is closed. The conversation store reports the problem.
      if (!(error instanceof DOMException)) throw error;
    }
  });
  return theme;
}
