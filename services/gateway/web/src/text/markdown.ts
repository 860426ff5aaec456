import DOMPurify from "dompurify";
import { Marked, type Token, type TokenizerAndRendererExtension, type Tokens } from "marked";
import { escapeHtml, highlight } from "./highlight";
import { MATH } from "./math";

/** Returns the address of a picture in a text, or null if the page may not load it. */
export type Pictures = (href: string) => string | null;

// Between digits, a star means a product or a power, so it neither begins nor ends emphasis.
const TIMES = /(?<=\d)\*+(?=\d)/g;

/**
 * Renders a model's Markdown, which is untrusted input. HTML in it is shown as text, and pictures become links, so that
 * the page loads nothing from other servers. `blockContent` keeps only the allowed tags and attributes of the result.
 */
const marked = renderer(() => null, MATH);

function renderer(pictures: Pictures, extensions: TokenizerAndRendererExtension[]): Marked {
  return new Marked({
    gfm: true,
    breaks: true,
    extensions,
    hooks: { emStrongMask: (text) => text.replace(TIMES, (stars) => "x".repeat(stars.length)) },
    tokenizer: {
      emStrong(text, masked) {
        const stars = /^\*+/.exec(text)?.[0];
        if (!stars || masked[masked.length - text.length] === "*") return false; // Markdown's usual rules decide
        return { type: "text", raw: stars, text: stars } as unknown as Tokens.Em;
      },
    },
    renderer: {
      html: ({ text }) => escapeHtml(text),
      heading({ depth, tokens }) {
        const tag = `h${Math.min(depth + 1, 6)}`; // the page's h1 is the conversation's title
        return `<${tag}>${this.parser.parseInline(tokens)}</${tag}>`;
      },
      image({ href, text }) {
        const address = pictures(href);
        if (address === null) return link(href, escapeHtml(text || href));
        return `<img src="${escapeHtml(address)}" alt="${escapeHtml(text)}">`;
      },
      link({ href, tokens }) {
        return link(href, this.parser.parseInline(tokens));
      },
      code: ({ text, lang }) => codeBlock(text, lang),
      checkbox: ({ checked }) => `<span class="check">${checked ? "☑" : "☐"}</span> `,
    },
  });
}

const ALLOWED = {
  ALLOWED_TAGS: (
    "a blockquote br button code del div em h2 h3 h4 h5 h6 hr li ol p pre span strong " +
    "table tbody td th thead tr ul"
  ).split(" "),
  ALLOWED_ATTR: [
    "align",
    "class",
    "data-copy",
    "data-display",
    "data-tex",
    "href",
    "rel",
    "start",
    "tabindex",
    "target",
    "type",
  ],
};

export interface Block {
  /** Blocks with equal keys are rendered to equal content. */
  key: string;
  token: Token;
}

/**
 * The top-level blocks of a text. While a text grows, only two kinds of blocks get new keys: the last ones and, when a
 * link reference arrives, those with a bracket, because they may have a link to it.
 */
export function blocks(text: string): Block[] {
  const tokens = marked.lexer(text);
  const references = JSON.stringify(tokens.links);
  return tokens
    .filter((token) => token.type !== "space" && token.type !== "def")
    .map((token) => ({ key: token.raw.includes("[") ? token.raw + references : token.raw, token }));
}

/** Safe content of one block. */
export function blockContent({ token }: Block): DocumentFragment {
  return DOMPurify.sanitize(marked.parser([token]), { ...ALLOWED, RETURN_DOM_FRAGMENT: true });
}

/**
 * Safe HTML of a whole text; `pictures` maps its pictures to their addresses. Formulas are not recognized,
 * because `\[` in a report is a bracket that the report has escaped.
 */
export function pageHtml(text: string, pictures: Pictures): string {
  const allowed = {
    ALLOWED_TAGS: [...ALLOWED.ALLOWED_TAGS, "img"],
    ALLOWED_ATTR: [...ALLOWED.ALLOWED_ATTR, "alt", "src"],
  };
  return DOMPurify.sanitize(renderer(pictures, []).parse(text, { async: false }), allowed);
}

function link(href: string, inner: string): string {
  return `<a href="${escapeHtml(href)}" target="_blank" rel="noopener noreferrer">${inner}</a>`;
}

function codeBlock(code: string, info: string | undefined): string {
  const language = /^[\w+#.-]+/.exec(info ?? "")?.[0].toLowerCase() ?? "";
  return (
    `<div class="code-block"><div class="code-head"><span>${escapeHtml(language)}</span>` +
    `<button type="button" class="quiet" data-copy>Copy</button></div>` +
    `<pre tabindex="0"><code>${highlight(code, language)}</code></pre></div>`
  );
}
