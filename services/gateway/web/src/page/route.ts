/** The page's address names the open conversation, so that reload, history and a second tab all work. */

export function routeOf(conversationId: string | null): string {
  return conversationId === null ? "#/" : `#/c/${conversationId}`;
}

/** Whether a text is a whole API key, and not the beginning of a key that a person is typing. */
export const isKey = (text: string): boolean => /^nc-[0-9a-f]{12}-[0-9a-f]{48}$/.test(text);

/** The API key in an address fragment, as in the link that `make run` prints; null if the fragment has none. */
export function keyOf(fragment: string): string | null {
  return /^#key=([\w-]+)$/.exec(fragment)?.[1] ?? null;
}

/** The conversation that an address fragment names, or null for a new chat. */
export function conversationIdOf(fragment: string): string | null {
  return /^#\/c\/([\w-]+)$/.exec(fragment)?.[1] ?? null;
}
