import type { ToolCall, ToolResult } from "../api/wire";
import { pictureUrl } from "../chat/pictures";
import { duration } from "../text/format";
import { highlight } from "../text/highlight";
import { ChevronIcon } from "./icons";

/** The sandbox's statuses in words for a person. */
const FAILURES: Record<string, string> = {
  error: "Error",
  timeout: "Took too long",
  memory: "Out of memory",
  output_limit: "Too much output",
  denied: "Not allowed",
  overloaded: "Python was busy",
};

interface Props {
  call: ToolCall;
  result: ToolResult | undefined;
  /** Whether the answer is still being written; only then can a missing result still come. */
  live: boolean;
}

/** One use of Python in an answer: the code, its output and its pictures, like a cell of a notebook. */
export function ToolCard({ call, result, live }: Props) {
  const pictures = result?.pictures ?? [];
  const state = result ? (result.status === "ok" ? "ok" : "failed") : live ? "running" : "unfinished";
  return (
    <details class="tool-card" data-testid="tool-card" data-state={state} open>
      <summary>
        <span class="tool-mark" aria-hidden="true" />
        <span class="tool-name">Python</span>
        <span class="tool-status">{statusText(result, live)}</span>
        <ChevronIcon />
      </summary>
      <div class="tool-body">
        <span class="tool-label">Code</span>
        <pre class="tool-code" data-testid="tool-code" tabIndex={0}>
          <code dangerouslySetInnerHTML={{ __html: highlight(call.code, "python") }} />
        </pre>
        {result && (
          <>
            <span class="tool-label">Output</span>
            <pre class="tool-output" data-testid="tool-output" tabIndex={0}>
              {result.output || <span class="faint">(nothing)</span>}
            </pre>
          </>
        )}
        {pictures.length > 0 && (
          <>
            <span class="tool-label">{pictures.length > 1 ? "Pictures" : "Picture"}</span>
            <div class="tool-pictures">
              {pictures.map((picture) => (
                <img key={picture.name} data-testid="tool-picture" src={pictureUrl(picture)} alt={picture.name} />
              ))}
            </div>
          </>
        )}
      </div>
    </details>
  );
}

function statusText(result: ToolResult | undefined, live: boolean): string {
  if (!result) return live ? "Running…" : "Not finished";
  const label = result.status === "ok" ? "Done" : (FAILURES[result.status] ?? result.status);
  return `${label} · ${duration(result.duration_seconds)}`;
}
