import { useLayoutEffect, useMemo, useRef } from "preact/hooks";
import { copyText } from "../page/clipboard";
import { morph } from "../page/morph";
import { blockContent, blocks, type Block as Source } from "../text/markdown";
import { typeset } from "../text/math";

const FEEDBACK_MS = 1600;

export function Markdown({ text }: { text: string }) {
  const sources = useMemo(() => blocks(text), [text]);
  return (
    <div class="prose" onClick={(event) => void copyCode(event.target as Element)}>
      {sources.map((source, index) => (
        <Block key={index} source={source} />
      ))}
    </div>
  );
}

/**
 * A block is rendered again only when its own source changes, so a new token of a long answer renders only the last
 * block. Unchanged nodes of a block stay, so that the person can select, scroll and copy while the answer is written.
 */
function Block({ source }: { source: Source }) {
  const root = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => {
    morph(root.current!, blockContent(source));
    void typeset(root.current!);
  }, [source.key]);
  return <div class="block" dir="auto" ref={root} />;
}

/** Copies a code block if the clicked element belongs to its copy button. */
export async function copyCode(target: Element): Promise<void> {
  const button = target.closest("button[data-copy]");
  const code = button?.closest(".code-block")?.querySelector("code")?.textContent;
  if (!button || code == null) return;
  button.textContent = (await copyText(code)) ? "Copied" : "Failed";
  setTimeout(() => {
    button.textContent = "Copy";
  }, FEEDBACK_MS);
}
