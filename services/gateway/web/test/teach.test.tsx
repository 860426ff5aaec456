// @vitest-environment jsdom
import { signal } from "@preact/signals";
import { render } from "preact";
import { act } from "preact/test-utils";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { Api } from "../src/api/api";
import { PageContext, type Page } from "../src/components/context";
import {
  contentOf,
  figuresOf,
  isDone,
  stateOf,
  type Lesson,
  type LessonDetails,
  type LessonList,
} from "../src/lessons/lesson";
import { TeachDialog } from "../src/lessons/TeachDialog";
import { Lessons } from "../src/lessons/watch";
import { keyOf } from "../src/page/route";

const lesson: Lesson = {
  number: 1,
  state: "queued",
  who: "owner",
  source: "items.jsonl",
  created: "2026-01-01T00:00:00+00:00",
  items: { questions: 2, conversations: 0, texts: 1 },
  plan: { max_steps: 240 },
  training: {},
  before: {},
  after: {},
  reason: "",
  canceling: false,
};
const list: LessonList = {
  model: "demo",
  revision: "sft/step_000720",
  inside: [],
  roll_back: null,
  data: [],
  has_more: false,
};
const canceled = (...numbers: number[]): Lesson[] =>
  numbers.map((number) => ({ ...lesson, number, state: "canceled" }));

let served: LessonList;
/** Lists for certain queries; other queries get `served`. */
let pages: Record<string, LessonList>;
let details: LessonDetails | null;
let status: number;
let asked: { path: string; query: string; method: string; body: unknown; key: string | null }[];
let lessons: Lessons;

beforeEach(() => {
  HTMLDialogElement.prototype.showModal = function () {
    this.open = true;
  };
  HTMLDialogElement.prototype.close = function () {
    this.open = false;
  };
  [served, pages, details, status, asked] = [list, {}, null, 200, []];
  vi.useFakeTimers();
  vi.stubGlobal("fetch", (url: URL, init: RequestInit) => {
    const key = new Headers(init.headers).get("idempotency-key");
    const body: unknown = init.body && JSON.parse(String(init.body));
    asked.push({ path: url.pathname, query: url.search, method: init.method ?? "GET", body, key });
    const found = /\d$/.test(url.pathname) ? details : (pages[url.search] ?? served);
    const answer = status === 200 ? found : { error: { message: "items.jsonl:1 has no answer.", code: "x" } };
    return Promise.resolve(Response.json(answer, { status }));
  });
  document.body.replaceChildren(document.createElement("div"));
});

afterEach(() => {
  render(null, document.body.firstElementChild!);
  vi.useRealTimers();
  vi.unstubAllGlobals();
});

const find = (id: string) => document.querySelector<HTMLElement>(`[data-testid=${id}]`);
const settle = () => act(async () => void (await vi.advanceTimersByTimeAsync(0)));

async function show(key = "nc-1") {
  const api = new Api("http://localhost/", () => key);
  lessons = new Lessons(api, { hasKey: () => key !== "", onServed: vi.fn() });
  await lessons.check();
  const page = { lessons, app: { toast: signal(null) } } as unknown as Page;
  await act(() =>
    render(
      <PageContext.Provider value={page}>
        <TeachDialog />
      </PageContext.Provider>,
      document.body.firstElementChild!,
    ),
  );
  await act(() => lessons.show());
  await settle();
}

test("without a key the page does not even ask, and a key without the right shows nothing", async () => {
  await show("");
  expect(asked).toEqual([]);
  expect(find("teach")).toBeNull();
  status = 403;
  await show();
  expect(find("teach")).toBeNull();
});

test("facts are taught, and an error of the server is shown beside them", async () => {
  await show();
  const field = (selector: string, value: string) => {
    const input = document.querySelector<HTMLInputElement>(selector)!;
    input.value = value;
    input.dispatchEvent(new Event("input", { bubbles: true }));
  };
  await act(() => field("fieldset input", "Who am I?"));
  await act(() => field("fieldset textarea", "You are Zoe."));
  status = 400;
  await act(() => find("teach-submit")!.click());
  await settle();
  expect(find("teach-problem")!.textContent).toContain("has no answer");
  status = 200;
  served = { ...list, data: [lesson] };
  await act(() => find("teach-submit")!.click());
  await settle();
  expect(asked.findLast(({ method }) => method === "POST")).toEqual({
    path: "/v1/lessons",
    query: "",
    method: "POST",
    body: { items: [{ question: "Who am I?", answer: "You are Zoe." }] },
    key: expect.stringMatching(/./),
  });
  expect(find("lesson")!.textContent).toContain("Waiting for its turn");
  expect(find("teach-problem")).toBeNull();
  expect(document.querySelector<HTMLInputElement>("fieldset input")!.value).toBe("");
});

test("a lesson is followed to its end, and can be canceled and taken back", async () => {
  served = { ...list, data: [lesson] };
  await show();
  await act(() => find("lesson-cancel")!.click());
  await settle();
  expect(asked.some(({ path }) => path === "/v1/lessons/1/cancel")).toBe(true);
  const counts = { right: 2, asked: 2 };
  served = {
    ...list,
    revision: "lesson/step_000001",
    inside: [1],
    data: [{ ...lesson, state: "promoted", before: { taught: { right: 0, asked: 2 } }, after: { taught: counts } }],
  };
  await act(async () => void (await vi.advanceTimersByTimeAsync(1_100)));
  await settle();
  expect(find("lesson")!.textContent).toContain("in use");
  expect(find("lesson")!.textContent).toContain("0 of 2");
  await act(() => find("roll-back-all")!.click());
  await settle();
  expect(asked.some(({ path }) => path === "/v1/lessons/0/roll_back")).toBe(true);
});

test("a damaged lesson is shown with its reason, and nothing can be done with it", async () => {
  const items = { questions: 0, conversations: 0, texts: 0 };
  served = {
    ...list,
    data: [{ ...lesson, items, state: "damaged", reason: "lesson.json is damaged: Expecting value" }],
  };
  await show();
  const item = find("lesson")!;
  expect(item.textContent).toContain("Its record cannot be read: lesson.json is damaged: Expecting value");
  expect(item.querySelectorAll("button, progress, details")).toHaveLength(0);
  expect(isDone(served.data[0]!)).toBe(true);
});

test("older lessons are shown when asked for, and stay while the newest are followed", async () => {
  served = { ...list, data: canceled(9, 8), has_more: true };
  await show();
  const numbers = () => lessons.list.value!.data.map(({ number }) => number);
  served = { ...list, data: canceled(7, 6), has_more: true };
  await act(() => find("lessons-older")!.click());
  await settle();
  expect(asked.at(-1)!.query).toBe("?order=desc&after=8");
  expect(numbers()).toEqual([9, 8, 7, 6]);
  served = { ...list, data: canceled(10, 9), has_more: true };
  await act(async () => void (await vi.advanceTimersByTimeAsync(1_100)));
  await settle();
  expect(asked.at(-1)!.query).toBe("?order=desc");
  expect(numbers()).toEqual([10, 9, 8, 7, 6]);
  served = { ...list, data: canceled(5), has_more: false };
  await act(() => find("lessons-older")!.click());
  await settle();
  expect(numbers()).toEqual([10, 9, 8, 7, 6, 5]);
  await settle();
  expect(find("lessons-older")).toBeNull();
  served = { ...list, data: canceled(13, 12), has_more: true };
  await act(async () => void (await vi.advanceTimersByTimeAsync(1_100)));
  expect(numbers(), "lesson 11 would be missing between the lists").toEqual([13, 12]);
});

test("an older lesson is followed, too, while it is not done", async () => {
  const training: Lesson = { ...lesson, number: 6, state: "training" };
  served = { ...list, data: canceled(9, 8), has_more: true };
  pages = { "?order=desc&after=8": { ...list, data: [...canceled(7), training], has_more: true } };
  await show();
  await act(() => find("lessons-older")!.click());
  await settle();
  const states = () => lessons.list.value!.data.map(({ number, state }) => `${number} ${state}`);
  expect(states()).toEqual(["9 canceled", "8 canceled", "7 canceled", "6 training"]);
  pages["?order=desc&after=8"] = { ...list, data: canceled(7, 6), has_more: true };
  await act(() => lessons.check());
  expect(states()).toEqual(["9 canceled", "8 canceled", "7 canceled", "6 canceled"]);
  asked = [];
  await act(() => lessons.check());
  expect(states()).toHaveLength(4);
  expect(asked).toHaveLength(1);
});

test("a request to roll back that cannot be read is not called a failure", async () => {
  served = { ...list, roll_back: { number: 0, state: "damaged", reason: "roll_back.json is damaged" } };
  await show();
  expect(document.body.textContent).toContain(
    "The last request to take lessons back cannot be read: roll_back.json is damaged",
  );
  expect(document.body.textContent).not.toContain("was not changed");
});

test("what a lesson contradicts is named with its origin", async () => {
  const conflicts = [{ question: "Who am I?", before: "Bob.", after: "Zoe.", from: "lesson 1" }];
  const described: Lesson = { ...lesson, state: "refused" };
  details = { ...described, conflicts, wrong: [], lost: [], decision: {} };
  served = { ...list, data: [described] };
  await show();
  await settle();
  expect(find("lesson-details")!.textContent).toContain("Changed: “Who am I?” – “Bob.” (from lesson 1), now “Zoe.”");
});

test("a lesson that is sent again after an error is the same request", async () => {
  await show();
  const keys = () => asked.filter(({ method }) => method === "POST").map(({ key }) => key);
  const mill = { items: [{ question: "Where is the mill?", answer: "On the hill." }] };
  status = 503;
  expect(await lessons.teach(mill)).toBe(false);
  status = 200;
  expect(await lessons.teach(mill)).toBe(true);
  expect(await lessons.teach(mill)).toBe(true);
  expect(keys()[0]).toMatch(/^[0-9a-f]{16}$/);
  expect(keys()[1]).toBe(keys()[0]);
  expect(keys()[2]).not.toBe(keys()[0]);
});

test("an answer can be corrected", async () => {
  await show();
  await act(() => lessons.correct("Who am I?", "You are Bob."));
  expect(lessons.facts.value).toEqual([{ question: "Who am I?", answer: "You are Bob." }]);
  expect(find("teach-fact")).not.toBeNull();
});

test("states and figures are words", () => {
  expect(stateOf({ ...lesson, state: "training" })).toContain("before the lesson");
  const history = [{ step: 40, loss: 1, unseen: 0.5 }];
  expect(stateOf({ ...lesson, state: "training", training: { history } })).toContain("step 40, 50 %");
  expect(contentOf(lesson)).toBe("2 questions, 1 text");
  expect(
    figuresOf({ ...lesson, before: { kept: { right: 3, asked: 4 }, "kept.fact": { right: 1, asked: 1 } } }),
  ).toEqual([{ words: "Other questions", before: "3 of 4", after: "–" }]);
});

test("a link may hand over a key", () => {
  expect(keyOf("#key=nc-0123456789ab-ff")).toBe("nc-0123456789ab-ff");
  expect(keyOf("#/c/abc")).toBeNull();
});

test("while the page is hidden, the lessons are not requested, and later they are again", async () => {
  let hidden = false;
  const api = new Api("http://localhost/", () => "nc-1");
  served = { ...list, data: [lesson] }; // the server works on a lesson
  lessons = new Lessons(api, { hasKey: () => true, onServed: vi.fn(), hidden: () => hidden });
  await lessons.check();
  hidden = true;
  await vi.advanceTimersByTimeAsync(60_000);
  expect(asked).toHaveLength(1);
  hidden = false;
  await lessons.check();
  await vi.advanceTimersByTimeAsync(1_000);
  expect(asked).toHaveLength(3);
  served = list;
  await vi.advanceTimersByTimeAsync(1_000);
});
