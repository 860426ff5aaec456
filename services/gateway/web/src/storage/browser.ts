/** The browser's storage, or null if its settings forbid it; even reading the property may throw. */
export function browserStorage(): Storage | null {
  try {
    return window.localStorage;
  } catch {
    return null;
  }
}
