/** Lessons as `/v1/lessons` describes them. */

export interface Counts {
  right: number;
  asked: number;
}

export type LessonState =
  "queued" | "training" | "examining" | "promoted" | "refused" | "failed" | "canceled" | "damaged";

export interface Lesson {
  number: number;
  state: LessonState;
  who: string;
  source: string;
  created: string;
  items: { questions: number; conversations: number; texts: number };
  plan: { max_steps: number };
  training: { steps?: number; seconds?: number; history?: { step: number; loss?: number; unseen: number }[] };
  before: Record<string, Counts>;
  after: Record<string, Counts>;
  reason: string;
  canceling: boolean;
}

export interface LessonDetails extends Lesson {
  /** Earlier answers that the lesson changes. `from` says where the model had learned the earlier answer. */
  conflicts: { question: string; before: string; after: string; from: string }[];
  wrong: { question: string; answer: string; expected: string }[];
  lost: { question: string; before: string; after: string }[];
  decision: { rules?: { passed: boolean | null; reason: string }[] };
}

export interface LessonList {
  model: string;
  revision: string;
  /** Numbers of the lessons that the served model has learned. */
  inside: number[];
  roll_back: { number: number; state: "requested" | "done" | "failed" | "damaged"; reason: string } | null;
  /** The newest lesson first. */
  data: Lesson[];
  /** Whether there are older lessons. */
  has_more: boolean;
}

export interface Fact {
  question: string;
  answer: string;
}

/** A new lesson: questions with their answers, or the content of a file. */
export type NewLesson = { items: Fact[] } | { text: string; name: string };

const GROUPS: readonly (readonly [group: string, words: string])[] = [
  ["taught", "The lesson’s questions"],
  ["unseen", "The same in unseen wordings"],
  ["ability", "The ability with new arguments"],
  ["earlier", "Questions of earlier lessons"],
  ["near", "The most similar other questions"],
  ["own", "General questions, answered as before"],
  ["kept", "Other questions"],
];

export const isDone = ({ state }: Lesson): boolean => !["queued", "training", "examining"].includes(state);

/** The numbers of right answers before and after a lesson: a row for each group of questions that was asked. */
export function figuresOf({ before, after }: Lesson): { words: string; before: string; after: string }[] {
  const shown = (counts: Counts | undefined) => (counts ? `${counts.right} of ${counts.asked}` : "–");
  return GROUPS.filter(([group]) => before[group] ?? after[group]).map(([group, words]) => ({
    words,
    before: shown(before[group]),
    after: shown(after[group]),
  }));
}

/** Appends to `list` those lessons of `known` that are older. Such old lessons are done and do not change any more. */
export function withOlder(list: LessonList, known: LessonList | null): LessonList {
  const oldest = list.data.at(-1)?.number;
  if (!known || known.model !== list.model || oldest === undefined || !list.has_more) return list;
  const older = known.data.filter(({ number }) => number < oldest);
  // If the lists have no lesson in common, they are not joined, because lessons between them could be missing.
  if (older.length === 0 || older.length === known.data.length) return list;
  return { ...list, data: [...list.data, ...older], has_more: known.has_more };
}

/** The content of a lesson in words, such as `3 questions, 1 text`. */
export function contentOf({ items }: Lesson): string {
  const parts: [number, string][] = [
    [items.questions, "question"],
    [items.conversations, "conversation"],
    [items.texts, "text"],
  ];
  return parts
    .filter(([count]) => count > 0)
    .map(([count, noun]) => `${count} ${noun}${count === 1 ? "" : "s"}`)
    .join(", ");
}

/** A text about the current step of a lesson, or about its end. */
export function stateOf(lesson: Lesson): string {
  const last = lesson.training.history?.at(-1);
  if (lesson.canceling) return "Being canceled";
  switch (lesson.state) {
    case "queued":
      return "Waiting for its turn";
    case "training":
      if (last) return `Training: step ${last.step}, ${Math.round(100 * last.unseen)} % of the questions answered`;
      return Object.keys(lesson.before).length > 0
        ? "Training begins"
        : "Asking the model the questions before the lesson";
    case "examining":
      return "Asking the model the questions after the lesson";
    case "promoted":
      return "Learned";
    case "refused":
      return "Refused";
    case "failed":
      return "Failed";
    case "canceled":
      return "Canceled";
    case "damaged":
      return "Its record cannot be read";
  }
}
