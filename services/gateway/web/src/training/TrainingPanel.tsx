import { useSignal } from "@preact/signals";
import { LossCurve } from "./LossCurve";
import {
  aboutTime,
  currentStage,
  ending,
  generationsOf,
  heldOutBits,
  isRunning,
  stagesOf,
  titleOf,
  trainingSecondsLeft,
  whoAnswers,
  type Generation,
  type Progress,
} from "./progress";
import type { TrainingWatch } from "./watch";

interface Props {
  watch: TrainingWatch;
  /** Whether a conversation is open. The panel is then folded to leave room for it. */
  chatting: boolean;
}

/** Shows the training of the model while it runs, and how it ended. */
export function TrainingPanel({ watch, chatting }: Props) {
  const closed = useSignal(false);
  const progress = watch.progress.value;
  if (!progress || closed.value) return null;
  const running = isRunning(progress);
  const over = ending(progress);
  if (!running && !watch.seenRunning.value && progress.served !== null) return null;
  return (
    <section aria-label="Training">
      <details class="training" data-testid="training" open={!chatting}>
        <summary>
          <span class="training-title">{running ? headline(progress) : (over ?? "The training is complete.")}</span>
          <span class="training-who" data-testid="training-who">
            {whoAnswers(progress)}
          </span>
        </summary>
        <div class="training-body">
          <Stages progress={progress} />
          <Numbers progress={progress} running={running} />
          <LossCurve progress={progress} />
          <Questions generations={generationsOf(progress)} />
          {!running && (
            <p class="training-end">
              {progress.promoted && (
                <a href="report" target="_blank" rel="noopener">
                  Read the report
                </a>
              )}
              <button type="button" class="button" onClick={() => (closed.value = true)}>
                Close
              </button>
            </p>
          )}
        </div>
        <div class="visually-hidden" aria-live="polite">
          {whoAnswers(progress)}
        </div>
      </details>
    </section>
  );
}

function headline(progress: Progress): string {
  const name = currentStage(progress);
  const stage = progress.stages[name];
  const share = stage ? ` · ${Math.floor((100 * stage.step) / stage.steps)} %` : "";
  return `${progress.model} is learning: ${titleOf(name).toLowerCase()}${share}`;
}

function Stages({ progress }: { progress: Progress }) {
  return (
    <ol class="training-stages" aria-label="Stages">
      {stagesOf(progress).map(({ name, state }) => (
        <li key={name} data-state={state} aria-current={state === "current" ? "step" : undefined}>
          {state === "done" && (
            <>
              <span aria-hidden="true">✓ </span>
              <span class="visually-hidden">done: </span>
            </>
          )}
          {titleOf(name)}
        </li>
      ))}
    </ol>
  );
}

function Numbers({ progress, running }: { progress: Progress; running: boolean }) {
  const stage = progress.stages[currentStage(progress)];
  const bits = heldOutBits(progress);
  const left = trainingSecondsLeft(progress);
  return (
    <>
      {stage && (
        <progress
          class="training-bar"
          aria-label={`Steps of ${titleOf(currentStage(progress)).toLowerCase()}`}
          value={stage.step}
          max={stage.steps}
        />
      )}
      <dl class="training-numbers">
        {running && stage?.compiling && <Fact name="Now" value="compiling the model, for up to a minute" />}
        {stage && (
          <Fact name="Step" value={`${stage.step.toLocaleString("en")} of ${stage.steps.toLocaleString("en")}`} />
        )}
        {stage?.curve.at(-1) && <Fact name="Loss" value={stage.curve.at(-1)![1].toFixed(3)} />}
        {bits !== null && <Fact name="Held-out bits per byte" value={bits.toFixed(3)} />}
        {running && stage?.tokens_per_second && (
          <Fact name="Tokens per second" value={Math.round(stage.tokens_per_second).toLocaleString("en")} />
        )}
        {running && stage && (
          <Fact
            name="Time left in this stage"
            value={stage.eta_seconds === null ? "not known yet" : aboutTime(stage.eta_seconds)}
          />
        )}
        {running && left !== null && <Fact name="Time left until the examination" value={aboutTime(left)} />}
      </dl>
    </>
  );
}

function Fact({ name, value }: { name: string; value: string }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd>{value}</dd>
    </div>
  );
}

/** The model's answers to the same questions at several steps. A slider shows earlier answers. */
function Questions({ generations }: { generations: Generation[] }) {
  const chosen = useSignal<number | null>(null); // null: always the newest answers
  const newest = generations.length - 1;
  if (newest < 0) return null;
  const shown = Math.min(chosen.value ?? newest, newest);
  const { stage, step, answers } = generations[shown]!;
  return (
    <section class="training-questions" aria-label="What the model answers">
      <ul>
        {answers.map(([question, answer]) => (
          <li key={question}>
            <p class="training-question">{question}</p>
            <p class="training-answer" data-testid="training-answer" dir="auto">
              {answer || "…"}
            </p>
          </li>
        ))}
      </ul>
      <label class="training-generation">
        <span>
          {titleOf(stage)}, step {step.toLocaleString("en")}
          {shown === newest ? " (newest)" : ""}
        </span>
        <input
          type="range"
          data-testid="training-generation"
          min={0}
          max={newest}
          value={shown}
          aria-valuetext={`${titleOf(stage)}, step ${step}`}
          onInput={(event) => {
            const value = Number(event.currentTarget.value);
            chosen.value = value === newest ? null : value;
          }}
        />
      </label>
    </section>
  );
}
