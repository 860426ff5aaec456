import type { Token } from "marked";
import { useMemo } from "preact/hooks";
import { copyText } from "../page/clipboard";
import { blockHtml, blocks } from "../text/markdown";

const FEEDBACK_MS = 1600;

export function Markdown({ text }: { text: string }) {
  const tokens = useMemo(() => blocks(text), [text]);
  return (
    <div class="prose" onClick={(event) => void copyCode(event.target as Element)}>
      {tokens.map((token, index) => (
        <Block key={index} token={token} />
      ))}
    </div>
  );
}

/** A block is rendered again only when its own source changes, so a long answer costs no more than its last block. */
function Block({ token }: { token: Token }) {
  const html = useMemo(() => blockHtml(token), [token.raw]);
  return <div class="block" dangerouslySetInnerHTML={{ __html: html }} />;
}

/** Copies the code block whose button was clicked, if one was. */
export async function copyCode(target: Element): Promise<void> {
  const button = target.closest("button[data-copy]");
  const code = button?.closest(".code-block")?.querySelector("code")?.textContent;
  if (!button || code == null) return;
  button.textContent = (await copyText(code)) ? "Copied" : "Failed";
  setTimeout(() => {
    button.textContent = "Copy";
  }, FEEDBACK_MS);
}
