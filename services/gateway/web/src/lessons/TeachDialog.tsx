import { useSignal } from "@preact/signals";
import { useEffect, useId } from "preact/hooks";
import { usePage } from "../components/context";
import { Dialog } from "../components/Dialog";
import { FilePicker } from "../components/FilePicker";
import { IconButton } from "../components/IconButton";
import { CloseIcon } from "../components/icons";
import { contentOf, figuresOf, isDone, stateOf, type Fact, type Lesson, type LessonDetails } from "./lesson";

/** The dialog that teaches the model. It is shown only to people who may teach. */
export function TeachDialog() {
  const { lessons } = usePage();
  if (!lessons.offered.value) return null;
  return (
    <Dialog open={lessons.open} title="Teach" testId="teach">
      <Writing />
      <Known />
    </Dialog>
  );
}

function Writing() {
  const { lessons } = usePage();
  const busy = useSignal(false);
  const facts = lessons.facts.value;
  const change = (index: number, fact: Partial<Fact>) =>
    (lessons.facts.value = facts.map((known, at) => (at === index ? { ...known, ...fact } : known)));
  const remove = (index: number) => {
    const rest = facts.filter((_, at) => at !== index);
    lessons.facts.value = rest.length > 0 ? rest : [{ question: "", answer: "" }];
  };
  const during = async (work: Promise<unknown>) => {
    busy.value = true;
    await work;
    busy.value = false;
  };
  return (
    <form
      class="teach-form"
      onSubmit={(event) => {
        event.preventDefault();
        void during(lessons.teachFacts());
      }}
    >
      <p class="hint">
        Write what the model should answer. It practices in further wordings, is examined, and is used only if it has
        not forgotten other things. This takes a few minutes.
      </p>
      {facts.map((fact, index) => (
        <FactFields
          key={index}
          number={index + 1}
          fact={fact}
          onChange={(changed) => change(index, changed)}
          onRemove={() => remove(index)}
        />
      ))}
      {lessons.problem.value && (
        <p class="teach-problem" role="alert" data-testid="teach-problem">
          {lessons.problem.value}
        </p>
      )}
      <div class="backup">
        <button type="submit" class="button primary" data-testid="teach-submit" disabled={busy.value}>
          Teach
        </button>
        <button
          type="button"
          class="button"
          data-testid="teach-add"
          onClick={() => (lessons.facts.value = [...facts, { question: "", answer: "" }])}
        >
          Another question
        </button>
        <FilePicker
          text="Teach a file…"
          label="File to teach"
          testId="teach-file"
          accept=".md,.txt,.jsonl,.markdown,.ndjson"
          disabled={busy.value}
          onFile={(file) => void during(file.text().then((text) => lessons.teach({ text, name: file.name })))}
        />
      </div>
    </form>
  );
}

interface FactProps {
  number: number;
  fact: Fact;
  onChange: (fact: Partial<Fact>) => void;
  onRemove: () => void;
}

function FactFields({ number, fact, onChange, onRemove }: FactProps) {
  const id = useId();
  return (
    <fieldset class="teach-fact" data-testid="teach-fact">
      <legend class="visually-hidden">Question {number}</legend>
      <label for={`${id}-question`}>Question</label>
      <IconButton label={`Remove question ${number}`} onClick={onRemove}>
        <CloseIcon />
      </IconButton>
      <input
        id={`${id}-question`}
        value={fact.question}
        placeholder="What is my dog called?"
        onInput={(event) => onChange({ question: event.currentTarget.value })}
      />
      <label for={`${id}-answer`}>Answer</label>
      <textarea
        id={`${id}-answer`}
        rows={2}
        value={fact.answer}
        placeholder="Your dog is called Biscuit."
        onInput={(event) => onChange({ answer: event.currentTarget.value })}
      />
    </fieldset>
  );
}

function Known() {
  const { lessons } = usePage();
  const list = lessons.list.value;
  if (!list) return null;
  const { roll_back, inside } = list;
  return (
    <section aria-label="Lessons">
      <h3>Lessons</h3>
      {roll_back?.state === "requested" && (
        <p role="status" class="hint">
          Going back to {roll_back.number === 0 ? "the model before its lessons" : `lesson ${roll_back.number}`}…
        </p>
      )}
      {(roll_back?.state === "failed" || roll_back?.state === "damaged") && (
        <p role="alert" class="teach-problem">
          {roll_back.state === "failed"
            ? "The model was not changed"
            : "The last request to take lessons back cannot be read"}
          : {roll_back.reason}
        </p>
      )}
      {list.data.length === 0 && <p class="hint">{list.model} has had no lesson yet.</p>}
      <ol class="teach-lessons">
        {list.data.map((lesson) => (
          <LessonItem
            key={lesson.number}
            lesson={lesson}
            isInside={inside.includes(lesson.number)}
            isNewest={inside.at(-1) === lesson.number}
          />
        ))}
      </ol>
      {list.has_more && (
        <button type="button" class="button" data-testid="lessons-older" onClick={() => void lessons.showOlder()}>
          Older lessons
        </button>
      )}
      {inside.length > 0 && (
        <button type="button" class="button" data-testid="roll-back-all" onClick={() => void lessons.rollBack(0)}>
          Take all lessons back
        </button>
      )}
    </section>
  );
}

function LessonItem({ lesson, isInside, isNewest }: { lesson: Lesson; isInside: boolean; isNewest: boolean }) {
  const { lessons } = usePage();
  const done = isDone(lesson);
  const last = lesson.training.history?.at(-1);
  return (
    <li data-testid="lesson" data-state={lesson.state}>
      <p class="teach-title">
        <strong>Lesson {lesson.number}</strong>
        {contentOf(lesson) && ` · ${contentOf(lesson)}`}
        {isInside && <span class="teach-inside">in use</span>}
      </p>
      <p role="status">
        {stateOf(lesson)}
        {lesson.reason && `: ${lesson.reason}`}
      </p>
      {!done && (
        <progress
          class="training-bar"
          aria-label={`Progress of lesson ${lesson.number}`}
          {...(last && lesson.state === "training" ? { value: last.step, max: lesson.plan.max_steps } : {})}
        />
      )}
      <Figures lesson={lesson} />
      {done && lesson.state !== "canceled" && lesson.state !== "damaged" && (
        <Details number={lesson.number} open={lesson.state === "refused"} />
      )}
      <p class="backup">
        {!done && !lesson.canceling && (
          <button
            type="button"
            class="button"
            data-testid="lesson-cancel"
            onClick={() => void lessons.cancel(lesson.number)}
          >
            Cancel
          </button>
        )}
        {lesson.state === "promoted" && !isNewest && (
          <button
            type="button"
            class="button"
            data-testid="roll-back"
            onClick={() => void lessons.rollBack(lesson.number)}
          >
            Go back to this lesson
          </button>
        )}
      </p>
    </li>
  );
}

function Figures({ lesson }: { lesson: Lesson }) {
  const rows = figuresOf(lesson);
  if (rows.length === 0) return null;
  return (
    <table class="teach-figures">
      <caption class="visually-hidden">Right answers</caption>
      <thead>
        <tr>
          <th scope="col">Right answers</th>
          <th scope="col">before</th>
          <th scope="col">after</th>
        </tr>
      </thead>
      <tbody>
        {rows.map(({ words, before, after }) => (
          <tr key={words}>
            <th scope="row">{words}</th>
            <td>{before}</td>
            <td>{after}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

/**
 * The rules that a lesson did not meet, and the answers that were wrong, lost or changed. They are requested once they
 * are open. For a refused lesson, they are open from the beginning.
 */
function Details({ number, open }: { number: number; open: boolean }) {
  const { lessons } = usePage();
  const shown = useSignal(open);
  const details = useSignal<LessonDetails | null>(null);
  useEffect(() => {
    if (shown.value && !details.value) void lessons.details(number).then((found) => (details.value = found));
  }, [shown.value]);
  const found = details.value;
  const refused = found?.decision.rules?.filter(({ passed }) => passed === false) ?? [];
  return (
    <details
      class="teach-details"
      open={shown.value}
      onToggle={(event) => (shown.value = event.currentTarget.open)}
      data-testid="lesson-details"
    >
      <summary>Why</summary>
      {found && (
        <ul>
          {refused.map(({ reason }) => (
            <li key={reason}>{reason}</li>
          ))}
          {found.wrong.map(({ question, answer }) => (
            <li key={`wrong ${question}`}>
              Wrong: “{question}” – “{answer}”
            </li>
          ))}
          {found.lost.map(({ question, before, after }) => (
            <li key={`lost ${question}`}>
              Lost: “{question}” – “{before}”, now “{after}”
            </li>
          ))}
          {found.conflicts.map(({ question, before, after, from }) => (
            <li key={`changed ${question} ${before}`}>
              Changed: “{question}” – “{before}” (from {from}), now “{after}”
            </li>
          ))}
          {refused.length + found.wrong.length + found.lost.length + found.conflicts.length === 0 && (
            <li>{found.reason || "Every rule was met, and no other answer was lost."}</li>
          )}
        </ul>
      )}
    </details>
  );
}
