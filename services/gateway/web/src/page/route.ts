/** The page's address names the open conversation, so that reload, history and a second tab all work. */

export function routeOf(conversationId: string | null): string {
  return conversationId === null ? "#/" : `#/c/${conversationId}`;
}

/** The conversation that an address fragment names, or null for a new chat. */
export function conversationIdOf(fragment: string): string | null {
  return /^#\/c\/([\w-]+)$/.exec(fragment)?.[1] ?? null;
}
