import type { Signal } from "@preact/signals";
import type { Conversation } from "../chat/conversation";
import type { AssistantMessage as Answer, Message } from "../chat/message";
import { segments } from "../chat/segments";
import { count, rate } from "../text/format";
import { CopyButton } from "./CopyButton";
import { IconButton } from "./IconButton";
import { Markdown } from "./Markdown";
import { ProblemNote } from "./ProblemNote";
import { ToolCard } from "./ToolCard";
import { Versions } from "./Versions";
import { usePage } from "./context";
import { RegenerateIcon } from "./icons";

const SHORTEST_MEASURED = 0.2; // seconds; the rate of a shorter answer would measure the network and not the model

interface Props {
  conversation: Conversation;
  message: Signal<Message>;
  last: boolean;
}

export function AssistantMessage({ conversation, message, last }: Props) {
  const { app, lessons } = usePage();
  const answer = message.value as Answer;
  const live = answer.state === "streaming";
  const parts = segments(answer.content, answer.toolEvents);
  const shown = conversation.messages.value;
  const asked = shown[shown.indexOf(message) - 1]?.value.content ?? "";
  const regenerate = () => app.regenerate(conversation, message);
  const end = parts.at(-1);
  const pythonRuns = end?.kind === "call" && !end.result;
  return (
    <article
      class="message answer"
      data-testid="message-assistant"
      data-state={answer.state}
      data-last={last}
      aria-label="Answer"
      aria-busy={live}
    >
      {parts.map((part) =>
        part.kind === "text" ? (
          <Markdown key={part.key} text={part.text} />
        ) : (
          <ToolCard key={part.key} call={part.call} result={part.result} live={live} />
        ),
      )}
      {live && !pythonRuns && (
        <p class="live">
          <span class="pulse" role="img" aria-label="Writing…" />
          <Footnotes answer={answer} />
        </p>
      )}
      {answer.problem && <ProblemNote problem={answer.problem} {...(last ? { retry: regenerate } : {})} />}
      {!live && (
        <footer class="actions">
          <Versions conversation={conversation} message={message} />
          {answer.content !== "" && <CopyButton label="Copy answer" text={() => answer.content} />}
          {last && !answer.problem && (
            <IconButton label="Write the answer again" data-testid="regenerate" onClick={regenerate}>
              <RegenerateIcon />
            </IconButton>
          )}
          {last && isCutOff(answer) && (
            <button
              type="button"
              class="quiet"
              data-testid="continue"
              onClick={() => app.continueAnswer(conversation, message)}
            >
              Continue
            </button>
          )}
          {lessons.offered.value && asked !== "" && answer.content !== "" && (
            <button
              type="button"
              class="quiet"
              data-testid="correct"
              onClick={() => lessons.correct(asked, answer.content)}
            >
              Teach another answer
            </button>
          )}
          <Footnotes answer={answer} />
        </footer>
      )}
    </article>
  );
}

/** Whether the answer was cut off, so that the model could continue it. */
function isCutOff({ content, state, finishReason }: Answer): boolean {
  return content !== "" && (state !== "complete" || finishReason === "length");
}

/** Shows whether the answer was stopped or cut off, its token counts, and its tokens per second. */
function Footnotes({ answer }: { answer: Answer }) {
  const { usage, seconds, state, finishReason } = answer;
  const notes: string[] = [];
  if (state === "stopped") notes.push("Stopped");
  if (finishReason === "length") notes.push("Cut off at the length limit");
  if (usage) notes.push(count(usage.completion_tokens, "token"));
  const writing = (seconds ?? 0) - toolSeconds(answer);
  if (usage && usage.completion_tokens > 1 && writing > SHORTEST_MEASURED) {
    notes.push(`${rate((usage.completion_tokens - 1) / writing)} tokens/s`);
  }
  const cached = usage?.prompt_tokens_details?.cached_tokens ?? 0;
  const details =
    usage && `Prompt: ${count(usage.prompt_tokens, "token")}, ${cached.toLocaleString("en")} from the cache`;
  return (
    <span class="footnotes" title={details} data-testid="footnotes">
      {notes.join(" · ")}
    </span>
  );
}

/** Seconds in which Python ran; the model wrote nothing meanwhile. */
function toolSeconds(answer: Answer): number {
  return answer.toolEvents.reduce((sum, event) => sum + (event.type === "result" ? event.duration_seconds : 0), 0);
}
