// @vitest-environment jsdom
import { signal } from "@preact/signals";
import { render } from "preact";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { ApiError, ConnectionError } from "../src/api/errors";
import type { Status } from "../src/api/status";
import { StatusPage } from "../src/components/StatusPage";
import { ratesBetween, StatusApp } from "../src/status/status-app";

const STATUS: Status = {
  engines: [
    {
      address: "10.0.0.1:50051",
      up: true,
      why_down: null,
      model: "demo",
      revision: "sft/step_10",
      running: 3,
      waiting: 1,
      parked: 0,
      waiting_tokens: 700,
      kv_use: 0.42,
    },
    {
      address: "10.0.0.2:50051",
      up: false,
      why_down: "it does not answer",
      model: null,
      revision: null,
      running: 0,
      waiting: 0,
      parked: 0,
      waiting_tokens: 0,
      kv_use: 0,
    },
  ],
  gateway: {
    requests_in_flight: 4,
    queue_length: 2,
    prompt_tokens: 1000,
    cached_prompt_tokens: 250,
    generation_tokens: 500,
    streams_lost: 0,
    draining: false,
  },
  limits: { requests: 60, tokens: 0, answers: 0 },
  keys: [{ id: "k1", name: "Ada", scopes: ["chat"], limits: { requests: 0, tokens: 0, answers: 2 }, state: "active" }],
  usage: [
    { day: "2026-11-28", key: "k1", requests: 2, refused: 1, prompt_tokens: 10, completion_tokens: 20 },
    { day: "2026-11-29", key: "k1", requests: 3, refused: 0, prompt_tokens: 1, completion_tokens: 2 },
    { day: "2026-11-29", key: "anonymous", requests: 7, refused: 0, prompt_tokens: 5, completion_tokens: 6 },
  ],
};

let reply: () => Promise<Status>;
let app: StatusApp;
let root: HTMLElement;

beforeEach(() => {
  vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout", "performance"] });
  reply = () => Promise.resolve(STATUS);
  app = new StatusApp("http://x/", signal("key"), () => reply());
  root = document.createElement("div");
  render(<StatusPage app={app} />, root);
});

afterEach(() => {
  app.stop();
  vi.useRealTimers();
});

async function read(): Promise<void> {
  await app.read();
  await new Promise((resolve) => setImmediate(resolve));
}

const state = () => root.querySelector("[data-testid=status]")!.getAttribute("data-state");
const rows = (id: string) =>
  Array.from(root.querySelectorAll(`[data-testid=${id}] tbody tr`), (row) =>
    Array.from(row.children, (cell) => cell.textContent!.trim()),
  );

test("engines, load, cache hits, keys with limits and usage are shown", async () => {
  await read();
  expect(state()).toBe("live");
  expect(rows("engines")).toEqual([
    ["10.0.0.1:50051", "demo sft/step_10", "3", "1 700 tokens", "0", "42 %"],
    ["10.0.0.2:50051 it does not answer", "…", "0", "0", "0", "0 %"],
  ]);
  expect(rows("keys")).toEqual([
    ["Ada", "chat", "2 at once", "5", "1", "11", "22"],
    ["Without a key", "", "60 requests/min", "7", "0", "5", "6"],
  ]);
  expect(root.textContent).toContain("Prompt tokens from caches25 %");
});

test("rates come from two readings, and not from those of two gateways", async () => {
  const later = { ...STATUS, gateway: { ...STATUS.gateway, generation_tokens: 540 } };
  expect(ratesBetween(STATUS, later, 2)).toEqual({ prompt: 0, generation: 20 });
  expect(ratesBetween(later, STATUS, 2)).toBeNull();
});

test("the page reads again by itself, also after the server was away", async () => {
  await read();
  reply = () => Promise.reject(new ConnectionError("gone"));
  await vi.advanceTimersByTimeAsync(2_000);
  expect(app.problem.value).toBe("unreachable");
  expect(app.status.value).not.toBeNull(); // the last status stays
  reply = () => Promise.resolve(STATUS);
  await vi.advanceTimersByTimeAsync(2_000);
  expect(app.problem.value).toBeNull();
});

test("a key without the scope is asked for again, and shows nothing", async () => {
  reply = () => Promise.reject(new ApiError("no", { status: 403 }));
  await read();
  expect(state()).toBe("key");
  expect(root.querySelector("[role=alert]")!.textContent).toContain("does not accept");
  expect(root.querySelector("table")).toBeNull();
  reply = () => Promise.resolve(STATUS);
  const field = root.querySelector<HTMLInputElement>("[data-testid=admin-key]")!;
  field.value = " other ";
  root.querySelector("form")!.dispatchEvent(new Event("submit", { cancelable: true }));
  await read();
  expect(app.key.value).toBe("other");
  expect(state()).toBe("live");
});

test("a late answer to the key before changes nothing", async () => {
  let refuse!: (error: ApiError) => void;
  reply = () => new Promise((_, reject) => (refuse = reject));
  const first = app.read();
  reply = () => Promise.resolve(STATUS);
  app.key.value = "other";
  await read();
  refuse(new ApiError("no", { status: 403 }));
  await first;
  expect(app.problem.value).toBeNull();
  expect(app.status.value).not.toBeNull();
});

test("a reading that ends after the page was hidden is the last one", async () => {
  let readings = 0;
  let arrive!: (status: Status) => void;
  reply = () => {
    readings += 1;
    return new Promise((resolve) => (arrive = resolve));
  };
  const reading = app.read();
  app.stop();
  arrive(STATUS);
  await reading;
  await vi.advanceTimersByTimeAsync(60_000);
  expect(readings).toBe(1);
  void app.read(); // the page is visible again
  arrive(STATUS);
  await vi.advanceTimersByTimeAsync(2_000);
  expect(readings).toBe(3);
});
