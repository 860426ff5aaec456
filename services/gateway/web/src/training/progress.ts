/** The progress of the model's training, as the gateway reports it at `/progress`, and the page's texts about it. */

export interface Point {
  step: number;
  [metric: string]: number;
}

export interface Answers {
  step: number;
  answers: [question: string, answer: string][];
}

export interface StageProgress {
  step: number;
  steps: number;
  tokens_per_second: number | null;
  eta_seconds: number | null;
  /** Whether the next step compiles the model. */
  compiling?: boolean;
  curve: [step: number, loss: number][];
  held_out: Point[];
  answers: Answers[];
}

export type RunState = "running" | "stopped" | "failed" | "refused" | "promoted";

export interface Run {
  recipe: string;
  stages: string[];
  tokens: Record<string, number>;
  /** The stage that runs, or that ran last. */
  stage: string;
  state: RunState;
  /** Durations of the finished stages in seconds, by the names of the stages. */
  seconds: Record<string, number>;
}

export interface Progress {
  model: string;
  promoted: string | null;
  served: string | null;
  age_seconds: number;
  run: Run | null;
  stages: Record<string, StageProgress>;
}

/** If `age_seconds` is larger than this, the run is probably dead. This limit is long: a step may take minutes. */
const SILENT_SECONDS = 180;

const TITLES: Record<string, string> = {
  data: "Data",
  tokenizer: "Tokenizer",
  base: "Pretraining",
  sft: "Fine-tuning",
  rl: "Practice",
  report: "Examination",
};

/** The names of the stages that train, in their order. */
const TRAINING = ["base", "sft", "rl"];

export const titleOf = (stage: string): string => TITLES[stage] ?? stage;

export interface StageState {
  name: string;
  state: "done" | "current" | "waiting";
}

/** All stages of the pipeline in their order; without a pipeline, the training stages that have written progress. */
export function stagesOf(progress: Progress): StageState[] {
  const { run } = progress;
  const names = run?.stages ?? TRAINING.filter((name) => name in progress.stages);
  const current = currentStage(progress);
  const at = run?.state === "promoted" ? names.length : names.indexOf(current);
  return names.map((name, index) => ({ name, state: index < at ? "done" : index === at ? "current" : "waiting" }));
}

/** The name of the stage that runs or ran last. */
export function currentStage({ run, stages }: Progress): string {
  return run?.stage ?? TRAINING.filter((name) => name in stages).at(-1) ?? "";
}

/** Whether the training seems to run now. */
export function isRunning(progress: Progress): boolean {
  if (progress.age_seconds > SILENT_SECONDS) return false;
  if (progress.run) return progress.run.state === "running";
  const stage = progress.stages[currentStage(progress)];
  return stage !== undefined && stage.step < stage.steps;
}

/** The loss curves of all stages, in the order of the training. */
export function curvesOf({ stages }: Progress): { name: string; curve: [number, number][] }[] {
  return TRAINING.filter((name) => (stages[name]?.curve.length ?? 0) > 0).map((name) => ({
    name,
    curve: stages[name]!.curve,
  }));
}

/** The answers to all questions after one step of one stage. */
export interface Generation {
  stage: string;
  step: number;
  answers: [question: string, answer: string][];
}

/** The answers of all stages, from the oldest to the newest. */
export function generationsOf({ stages }: Progress): Generation[] {
  return TRAINING.flatMap((stage) => (stages[stage]?.answers ?? []).map((answers) => ({ stage, ...answers })));
}

/** The newest held-out bits per byte; null before the first evaluation. */
export function heldOutBits({ stages }: Progress): number | null {
  return stages.base?.held_out.findLast((point) => "val_bpb" in point)?.val_bpb ?? null;
}

/**
 * Estimated seconds until all training is done, without the examination; null while unknown. The estimate assumes that
 * later stages need as much time per token as the current stage, and as much time to start as the last finished stage.
 */
export function trainingSecondsLeft(progress: Progress): number | null {
  const { run, stages } = progress;
  const current = currentStage(progress);
  const stage = stages[current];
  if (!run || !stage || stage.eta_seconds === null || !stage.tokens_per_second) return null;
  let seconds = stage.eta_seconds;
  for (const name of run.stages.slice(run.stages.indexOf(current) + 1).filter((name) => TRAINING.includes(name))) {
    const tokens = run.tokens[name];
    if (tokens === undefined) return null;
    seconds += tokens / stage.tokens_per_second + startSeconds(progress);
  }
  return seconds;
}

/** Seconds that the last finished training stage needed in addition to its steps. */
function startSeconds({ run, stages }: Progress): number {
  const finished = TRAINING.findLast((name) => run?.seconds[name] !== undefined);
  const speed = finished && stages[finished]?.tokens_per_second;
  const tokens = finished && run?.tokens[finished];
  if (!speed || !tokens) return 0;
  return Math.max(0, run!.seconds[finished]! - tokens / speed);
}

/** A sentence that says which model answers, for the page and for screen readers. */
export function whoAnswers({ promoted, served, run }: Progress): string {
  if (served === null) return "No model can answer yet. A message that you send now waits for the first snapshot.";
  if (served === promoted) return "The model has passed its examination. It answers now.";
  const [stage, step] = served.split("/step_");
  const snapshot = `A snapshot of ${titleOf(stage ?? "").toLowerCase()} answers, after ${Number(step).toLocaleString("en")} steps`;
  return run?.state === "refused" ? `${snapshot}: the model did not pass its examination.` : `${snapshot}.`;
}

/** A sentence about a run that has ended without a promotion; null if the run continues or its model is promoted. */
export function ending(progress: Progress): string | null {
  if (isRunning(progress)) return null;
  switch (progress.run?.state) {
    case "promoted":
      return null;
    case "stopped":
      return "The training was stopped. To continue from here, run the same command again.";
    case "failed":
      return "The training failed. The output of its program says why.";
    case "refused":
      return "The training is done, but the model did not pass its examination. The report says why.";
    default:
      return "The training has not given a sign of life for some minutes.";
  }
}

/** A rounded duration as text, such as "about 40 s", "about 3 min" or "about 2 h 10 min". */
export function aboutTime(seconds: number): string {
  if (seconds < 90) return `about ${Math.max(5, 5 * Math.round(seconds / 5))} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 100) return `about ${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return `about ${hours} h ${minutes - 60 * hours} min`;
}
