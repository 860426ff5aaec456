/** The browser's storage, or null where its settings forbid it: even looking at it may throw. */
export function browserStorage(): Storage | null {
  try {
    return window.localStorage;
  } catch {
    return null;
  }
}
