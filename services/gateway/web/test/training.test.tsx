// @vitest-environment jsdom
import { render } from "preact";
import { act } from "preact/test-utils";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import {
  aboutTime,
  ending,
  generationsOf,
  heldOutBits,
  isRunning,
  stagesOf,
  trainingSecondsLeft,
  whoAnswers,
  type Progress,
  type Run,
  type StageProgress,
} from "../src/training/progress";
import { TrainingPanel } from "../src/training/TrainingPanel";
import { TrainingWatch } from "../src/training/watch";

const base: StageProgress = {
  step: 320,
  steps: 320,
  tokens_per_second: 10_000,
  eta_seconds: 0,
  curve: [
    [1, 7],
    [160, 3],
    [320, 2],
  ],
  held_out: [
    { step: 160, val_bpb: 1.5 },
    { step: 320, val_bpb: 1.25 },
  ],
  answers: [{ step: 0, answers: [["Who are you?", "q9x"]] }],
};
const sft: StageProgress = {
  step: 80,
  steps: 720,
  tokens_per_second: 8_000,
  eta_seconds: 160,
  curve: [
    [1, 4],
    [80, 1],
  ],
  held_out: [{ step: 80, val_loss: 1.1 }],
  answers: [
    { step: 0, answers: [["Who are you?", "the the the"]] },
    { step: 80, answers: [["Who are you?", "I am nanochat."]] },
  ],
};
const run: Run = {
  recipe: "demo",
  stages: ["data", "tokenizer", "base", "sft", "report"],
  tokens: { base: 640_000, sft: 1_440_000 },
  stage: "sft",
  state: "running",
  seconds: { data: 5, tokenizer: 2, base: 80 },
};
const learning: Progress = {
  model: "demo",
  promoted: null,
  served: null,
  age_seconds: 1,
  run,
  stages: { base, sft },
};

test("the stages before the current one are done, and those after it wait", () => {
  expect(stagesOf(learning).map(({ state }) => state)).toEqual(["done", "done", "done", "current", "waiting"]);
  const promoted = { ...learning, run: { ...run, state: "promoted" as const } };
  expect(new Set(stagesOf(promoted).map(({ state }) => state))).toEqual(new Set(["done"]));
});

test("a stage that was started alone is shown too", () => {
  const alone = { ...learning, run: null };
  expect(stagesOf(alone)).toEqual([
    { name: "base", state: "done" },
    { name: "sft", state: "current" },
  ]);
  expect(isRunning(alone)).toBe(true);
  expect(isRunning({ ...alone, stages: { base } })).toBe(false);
});

test("a run without a sign of life does not count as running", () => {
  expect(isRunning(learning)).toBe(true);
  expect(isRunning({ ...learning, age_seconds: 600 })).toBe(false);
  expect(ending({ ...learning, age_seconds: 600 })).toContain("no sign of life".slice(3));
});

test.each([
  ["stopped", "stopped"],
  ["failed", "failed"],
  ["refused", "did not pass"],
] as const)("a run that was %s says so", (state, words) => {
  expect(ending({ ...learning, run: { ...run, state } })).toContain(words);
});

test("the time left has the later stages, with the start that the finished stage took", () => {
  // Pretraining goes on for 32 s. Fine-tuning has 1,440,000 tokens at 10,000 a second. No stage has ended yet.
  const pretraining = {
    ...learning,
    run: { ...run, stage: "base", seconds: {} },
    stages: { base: { ...base, step: 160, eta_seconds: 32 } },
  };
  expect(trainingSecondsLeft(pretraining)).toBe(32 + 144);
  // The last training stage has its own estimate.
  expect(trainingSecondsLeft(learning)).toBe(160);
  // Pretraining took 80 s for 64 s of steps, so practice needs 16 s to start.
  const practice = {
    ...run,
    stages: [...run.stages.slice(0, 4), "rl", "report"],
    tokens: { ...run.tokens, rl: 80_000 },
  };
  expect(trainingSecondsLeft({ ...learning, run: practice })).toBe(160 + 10 + 16);
});

test("nobody guesses the time left before two steps are done", () => {
  expect(trainingSecondsLeft({ ...learning, stages: { sft: { ...sft, eta_seconds: null } } })).toBeNull();
  expect(trainingSecondsLeft({ ...learning, run: null })).toBeNull();
});

test.each([
  [3, "about 5 s"],
  [62, "about 60 s"],
  [100, "about 2 min"],
  [7_800, "about 2 h 10 min"],
])("%s seconds are %s", (seconds, words) => expect(aboutTime(seconds)).toBe(words));

test("one reads who answers", () => {
  expect(whoAnswers(learning)).toContain("waits for the first snapshot");
  const snapshot = { ...learning, served: "sft/step_000240" };
  expect(whoAnswers(snapshot)).toBe("A snapshot of fine-tuning answers, after 240 steps.");
  expect(whoAnswers({ ...snapshot, run: { ...run, state: "refused" } })).toContain("did not pass");
  expect(whoAnswers({ ...snapshot, promoted: "sft/step_000240" })).toContain("has passed");
});

test("the answers of all stages are one row from babble to facts", () => {
  expect(generationsOf(learning).map(({ stage, step }) => [stage, step])).toEqual([
    ["base", 0],
    ["sft", 0],
    ["sft", 80],
  ]);
  expect(heldOutBits(learning)).toBe(1.25);
  expect(heldOutBits({ ...learning, stages: { sft } })).toBeNull();
});

let root: HTMLElement;
beforeEach(() => {
  root = document.body.appendChild(document.createElement("div"));
});
afterEach(() => {
  render(null, root);
  root.remove();
  vi.unstubAllGlobals();
  vi.useRealTimers();
});

function show(progress: Progress | null, seenRunning = true): TrainingWatch {
  const watch = new TrainingWatch("http://host/");
  watch.progress.value = progress;
  watch.seenRunning.value = seenRunning;
  act(() => render(<TrainingPanel watch={watch} chatting={false} />, root));
  return watch;
}

test("the panel shows stage, numbers, curve and the newest answers", () => {
  show(learning);
  const text = root.textContent!;
  for (const part of ["fine-tuning · 11 %", "80 of 720", "1.250", "8,000", "about 3 min", "I am nanochat."]) {
    expect(text).toContain(part);
  }
  const curve = root.querySelector("[data-testid=loss-curve]")!;
  expect(curve.querySelectorAll("polyline").length).toBe(2);
  expect(curve.getAttribute("aria-label")).toBe(
    "Loss from 7.00 down to 1.00: Pretraining at 2.00, Fine-tuning at 1.00",
  );
});

test("the panel says that the model is being compiled", () => {
  const compiling = { ...sft, step: 0, eta_seconds: null, tokens_per_second: null, compiling: true };
  show({ ...learning, stages: { base, sft: compiling } });
  expect(root.textContent).toContain("compiling the model");
  show(learning);
  expect(root.textContent).not.toContain("compiling the model");
});

test("the slider shows what earlier snapshots answered, and its end follows the newest", () => {
  const watch = show(learning);
  const slider = root.querySelector<HTMLInputElement>("[data-testid=training-generation]")!;
  const move = (value: number) =>
    act(() => {
      slider.value = String(value);
      slider.dispatchEvent(new Event("input", { bubbles: true }));
    });
  const answer = () => root.querySelector("[data-testid=training-answer]")!.textContent;
  move(0);
  expect(answer()).toBe("q9x");
  const later = {
    ...sft,
    answers: [...sft.answers, { step: 160, answers: [["Who are you?", "I am it."]] as [string, string][] }],
  };
  act(() => {
    watch.progress.value = { ...learning, stages: { base, sft: later } };
  });
  expect(answer()).toBe("q9x");
  move(3);
  expect(answer()).toBe("I am it.");
});

test("a training that ended before the page was opened takes no room, unless nothing can answer", () => {
  const ended = { ...learning, run: { ...run, state: "promoted" as const }, promoted: "sft/step_000720" };
  show({ ...ended, served: "sft/step_000720" }, false);
  expect(root.textContent).toBe("");
  show({ ...learning, run: { ...run, state: "failed" } }, false);
  expect(root.textContent).toContain("The training failed");
});

test("when the promoted model answers, the panel says so, links the report and can be closed", () => {
  const ended = { ...learning, run: { ...run, state: "promoted" as const }, promoted: "sft/step_000720" };
  show({ ...ended, served: "sft/step_000720" });
  expect(root.textContent).toContain("The model has passed its examination. It answers now.");
  expect(root.querySelector("a")!.getAttribute("href")).toBe("report");
  act(() => {
    root.querySelector("button")!.click();
  });
  expect(root.textContent).toBe("");
});

test("an answer cannot bring HTML into the page", () => {
  const evil = {
    ...sft,
    answers: [{ step: 80, answers: [["Hi?", "<img src=x onerror=alert(1)>"]] as [string, string][] }],
  };
  show({ ...learning, stages: { sft: evil } });
  expect(root.querySelector("img")).toBeNull();
  expect(root.textContent).toContain("<img src=x");
});

test("the watch asks again while the training runs, and tells when another revision answers", async () => {
  vi.useFakeTimers();
  const answers = [learning, { ...learning, served: "sft/step_000120" }, { ...learning, served: "sft/step_000120" }];
  let asked = 0;
  vi.stubGlobal("fetch", () => Promise.resolve(new Response(JSON.stringify(answers[Math.min(asked++, 2)]))));
  const served = vi.fn();
  const watch = new TrainingWatch("http://host/", { onServed: served });
  await watch.check();
  expect(watch.seenRunning.value).toBe(true);
  await vi.advanceTimersByTimeAsync(5_000);
  expect(asked).toBe(3);
  expect(served).toHaveBeenCalledTimes(1);
  watch.stop();
  await vi.advanceTimersByTimeAsync(60_000);
  expect(asked).toBe(3);
});

test("the watch asks soon until the promoted model answers", async () => {
  vi.useFakeTimers();
  const revision = "sft/step_000720";
  const promoted = { ...learning, run: { ...run, state: "promoted" as const }, promoted: revision };
  const answers = [learning, { ...promoted, served: "sft/step_000600" }, { ...promoted, served: revision }];
  let asked = 0;
  vi.stubGlobal("fetch", () => Promise.resolve(new Response(JSON.stringify(answers[Math.min(asked++, 2)]))));
  const watch = new TrainingWatch("http://host/");
  await watch.check();
  await vi.advanceTimersByTimeAsync(15_000);
  expect(watch.progress.value!.served).toBe(revision);
  expect(asked).toBe(3);
  watch.stop();
});

test("a server that fails for a moment takes nothing from the page", async () => {
  vi.useFakeTimers();
  let asked = 0;
  vi.stubGlobal("fetch", () => {
    asked++;
    return asked === 1
      ? Promise.resolve(new Response(JSON.stringify(learning)))
      : Promise.reject(new TypeError("gone"));
  });
  const watch = new TrainingWatch("http://host/");
  await watch.check();
  await vi.advanceTimersByTimeAsync(4_000);
  expect(asked).toBe(3);
  expect(watch.progress.value).toEqual(learning);
  watch.stop();
});

test.each([
  [true, 3],
  [false, 1],
])("without a training the watch asks rarely, unless there is no model yet (%s)", async (waiting, times) => {
  vi.useFakeTimers();
  let asked = 0;
  vi.stubGlobal("fetch", () => {
    asked++;
    return Promise.resolve(new Response("{}", { status: 404 }));
  });
  const watch = new TrainingWatch("http://host/", { waiting: () => waiting });
  await watch.check();
  await vi.advanceTimersByTimeAsync(4_000);
  expect(asked).toBe(times);
  watch.stop();
});

test("while the page is hidden, the watch requests nothing, and it goes on when it is asked again", async () => {
  vi.useFakeTimers();
  let [asked, hidden] = [0, false];
  vi.stubGlobal("fetch", () => {
    asked++;
    return Promise.resolve(new Response(JSON.stringify(learning)));
  });
  const watch = new TrainingWatch("http://host/", { hidden: () => hidden });
  await watch.check();
  hidden = true;
  await vi.advanceTimersByTimeAsync(120_000);
  expect(asked).toBe(1);
  hidden = false;
  await watch.check();
  await vi.advanceTimersByTimeAsync(2_000);
  expect(asked).toBe(3);
  watch.stop();
});

test.each([
  ["the server is away", () => Promise.reject(new TypeError("gone"))],
  ["no engine answers", () => Promise.resolve(new Response("{}", { status: 503 }))],
])("while %s, the pauses grow to eight seconds", async (_, fail) => {
  vi.useFakeTimers();
  const start = Date.now();
  const asked: number[] = [];
  vi.stubGlobal("fetch", () => {
    asked.push((Date.now() - start) / 1000);
    const away = asked.length > 1 && asked.length < 8;
    return away ? fail() : Promise.resolve(new Response(JSON.stringify(learning)));
  });
  const watch = new TrainingWatch("http://host/");
  await watch.check();
  await vi.advanceTimersByTimeAsync(44_000);
  expect(asked).toEqual([0, 2, 4, 8, 16, 24, 32, 40, 42, 44]);
  watch.stop();
});
