import type { TokenizerAndRendererExtension, Tokens } from "marked";
import { escapeHtml } from "./highlight";

const LONGEST_FORMULA = 10_000; // characters; a longer formula is shown as its source

// A blank line ends a formula, so that a bracket without its partner does not swallow the rest of a text.
const CONTENT = String.raw`((?:(?!\n[ \t]*\n)[\s\S])+?)`;
const DISPLAY = String.raw`(?:\\\[${CONTENT}\\\]|\$\$${CONTENT}\$\$)`;
const INLINE_DISPLAY = new RegExp(`^${DISPLAY}`);
const INLINE = new RegExp(String.raw`^\\\(${CONTENT}\\\)`);
const BLOCK = new RegExp(String.raw`^ {0,3}${DISPLAY}[ \t]*(?:\n+|$)`);

/** Formulas between `\(` and `\)`, and displayed formulas between `\[` and `\]` or `$$` and `$$`. */
export const MATH: TokenizerAndRendererExtension[] = [
  {
    name: "displayed-math",
    level: "block",
    start: (text) => /^ {0,3}(?:\\\[|\$\$)/m.exec(text)?.index,
    tokenizer: (text) => formula("displayed-math", BLOCK.exec(text)),
    renderer: (token) => place("div", token, " data-display"),
  },
  {
    name: "math",
    level: "inline",
    start: (text) => /\\[([]|\$\$/.exec(text)?.index,
    tokenizer: (text) => formula("math", INLINE.exec(text) ?? INLINE_DISPLAY.exec(text)),
    renderer: (token) => place("span", token, token.raw.startsWith(String.raw`\(`) ? "" : " data-display"),
  },
];

function formula(type: string, match: RegExpExecArray | null): Tokens.Generic | undefined {
  return match ? { type, raw: match[0], tex: (match[1] ?? match[2])!.trim() } : undefined;
}

/** HTML of an element that shows the source of a formula until `typeset` replaces it. */
function place(tag: string, { raw, tex }: Tokens.Generic, attributes: string): string {
  return `<${tag} class="math" data-tex="${escapeHtml(tex as string)}"${attributes}>${escapeHtml(raw.trim())}</${tag}>`;
}

/** Typesets the formulas in an element. The typesetter is loaded with the first formula. */
export async function typeset(root: Element): Promise<void> {
  const waiting = () => root.querySelectorAll<HTMLElement>("[data-tex]:not([data-typeset])");
  if (waiting().length === 0) return;
  const loaded = await import("./katex").catch(() => null);
  if (loaded === null) return; // the server does not answer: the sources stay, and the next formula tries again
  const { katex } = loaded;
  for (const element of waiting()) {
    const { tex, display } = element.dataset;
    element.dataset.typeset = "";
    if (tex!.length > LONGEST_FORMULA) continue;
    const set = document.createElement("span");
    try {
      katex.render(tex!, set, { displayMode: display !== undefined, strict: "ignore" });
    } catch (error) {
      if (!(error instanceof katex.ParseError)) throw error;
      continue; // the formula has an error, so its source stays visible
    }
    element.replaceChildren(...set.childNodes);
  }
}
