const LONGEST_TITLE = 48; // about one line of the sidebar

const LONGEST_SEARCH = 2_000; // only this many characters are searched for the end of the first line

/**
 * A short title from the first line of a message, without the marks that begin a Markdown line. A longer line is cut,
 * between words if possible.
 */
export function titleOf(message: string): string {
  const line =
    message
      .slice(0, LONGEST_SEARCH)
      .split("\n")
      .map((text) => text.replace(/^\s*(?:#+|>|[-*+])\s+|^\s*`{3,}\w*|`/g, "").trim())
      .find((text) => text !== "") ?? "New chat";
  const characters = Array.from(line.replace(/\s+/g, " "));
  if (characters.length <= LONGEST_TITLE) return characters.join("");
  const cut = characters.slice(0, LONGEST_TITLE).join("");
  const lastSpace = cut.lastIndexOf(" ");
  return `${lastSpace > LONGEST_TITLE / 2 ? cut.slice(0, lastSpace) : cut}…`;
}
