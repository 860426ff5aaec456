// @vitest-environment jsdom
import { signal } from "@preact/signals";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import type { Api, Readiness } from "../src/api/api";
import { ApiError, ConnectionError } from "../src/api/errors";
import type { ChatPart, ChatRequest } from "../src/api/wire";
import { ChatApp } from "../src/chat/chat-app";
import type { Conversation } from "../src/chat/conversation";
import type { AssistantMessage } from "../src/chat/message";
import { ConversationStore } from "../src/storage/conversation-store";
import { DEFAULTS } from "../src/storage/settings";

const READY = () => Promise.resolve({ status: 200, waitsFor: null });

type Reply = (request: ChatRequest, signal: AbortSignal) => AsyncGenerator<ChatPart>;

/** Stands in for the server: answers each request with the next reply. The last reply answers all further requests. */
class FakeApi {
  requests: ChatRequest[] = [];
  ready: () => Promise<Readiness> = READY;
  replies: Reply[] = [says("Hello.")];

  readiness = () => this.ready();
  models = () => Promise.resolve([{ id: "demo" }]);
  chat = (request: ChatRequest, abort: AbortSignal) => {
    this.requests.push(request);
    return (this.replies.length > 1 ? this.replies.shift()! : this.replies[0]!)(request, abort);
  };
}

function says(...words: string[]): Reply {
  return async function* () {
    for (const text of words) yield { kind: "text", text };
    yield { kind: "finish", reason: "stop" };
  };
}

function fails(error: Error, ...words: string[]): Reply {
  return async function* () {
    for (const text of words) yield { kind: "text", text };
    throw error;
  };
}

/** Says one word and then waits until it is stopped. */
const lingers: Reply = async function* (_, abort) {
  yield { kind: "text", text: "Well" };
  await new Promise((_resolve, reject) => abort.addEventListener("abort", () => reject(abort.reason as Error)));
};

let api: FakeApi;
let app: ChatApp;

beforeEach(() => {
  vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout", "Date"] });
  localStorage.clear();
  api = new FakeApi();
  app = open();
});

afterEach(() => {
  app.health.stop();
  vi.useRealTimers();
});

function open(): ChatApp {
  const result = new ChatApp(api as unknown as Api, new ConversationStore(localStorage), signal({ ...DEFAULTS }));
  result.start();
  return result;
}

async function settled(): Promise<void> {
  await vi.advanceTimersByTimeAsync(0);
}

function active(): Conversation {
  return app.active.value!;
}

function contents(): string[] {
  return active().messages.value.map((message) => message.value.content);
}

function lastAnswer(): AssistantMessage {
  return active().messages.value.at(-1)!.value as AssistantMessage;
}

test("a message begins a conversation that is titled, answered and still there after a reload", async () => {
  app.send("Who are you?");
  await settled();
  expect(active().title.value).toBe("Who are you?");
  expect(contents()).toEqual(["Who are you?", "Hello."]);
  expect(lastAnswer().state).toBe("complete");
  expect(app.announcement.value).toBe("Answer: Hello.");
  const reopened = open();
  reopened.health.stop();
  expect(reopened.conversations.value.map((conversation) => conversation.snapshot())).toEqual([active().snapshot()]);
  expect(reopened.conversations.value.map(({ header }) => header.value)).toEqual([active().header.value]);
});

test("a second message goes out with the first turn", async () => {
  app.send("One");
  await settled();
  app.send("Two");
  await settled();
  expect(api.requests[1]!.messages).toEqual([
    { role: "user", content: "One" },
    { role: "assistant", content: "Hello." },
    { role: "user", content: "Two" },
  ]);
  expect(api.requests[1]).toMatchObject({ model: "demo", temperature: DEFAULTS.temperature, top_k: DEFAULTS.topK });
});

test("while an answer is written nothing else is sent; stopping keeps what has arrived", async () => {
  api.replies = [lingers];
  app.send("Tell me");
  await settled();
  app.send("Hurry");
  expect(api.requests).toHaveLength(1);
  app.stop(active());
  await settled();
  expect(lastAnswer()).toMatchObject({ content: "Well", state: "stopped" });
  expect(active().running.value).toBeNull();
});

test("an interrupted answer keeps its text, and asking again makes another version of it", async () => {
  api.replies = [fails(new ApiError("the engine is gone"), "Half an"), says("A whole answer.")];
  app.send("Hi");
  await settled();
  expect(lastAnswer()).toMatchObject({
    content: "Half an",
    state: "interrupted",
    problem: { kind: "interrupted", detail: "the engine is gone" },
  });
  app.regenerate(active(), active().messages.value.at(-1)!);
  await settled();
  expect(contents()).toEqual(["Hi", "A whole answer."]);
  const [half] = active().versionsOf(active().messages.value[1]!);
  app.show(active(), half!);
  expect(contents()).toEqual(["Hi", "Half an"]);
});

test("a failing server destroys no answer", async () => {
  api.replies = [says("First."), fails(new ConnectionError("gone"))];
  app.send("Hi");
  await settled();
  app.regenerate(active(), active().messages.value[1]!);
  await settled();
  expect(lastAnswer()).toMatchObject({ content: "", problem: { kind: "unreachable" } });
  const versions = active().versionsOf(active().messages.value[1]!);
  expect(versions.map((version) => version.value.content)).toEqual(["First.", ""]);
  app.show(active(), versions[0]!);
  expect(contents()).toEqual(["Hi", "First."]);
  const reopened = open();
  reopened.health.stop();
  expect(reopened.conversations.value[0]!.snapshot().map((message) => message.content)).toEqual(["Hi", "First."]);
});

test("a cut-off answer is continued: the model gets its beginning, and the events of both parts fit together", async () => {
  const call = (offset: number): ChatPart => ({
    kind: "tool",
    event: { type: "call", call_index: 0, code: "1", offset },
  });
  const result: ChatPart = {
    kind: "tool",
    event: { type: "result", call_index: 0, status: "ok", output: "1", duration_seconds: 0 },
  };
  const cut = (...parts: ChatPart[]): Reply =>
    async function* () {
      yield* parts;
      yield { kind: "finish", reason: "length" };
    };
  api.replies = [
    cut({ kind: "text", text: "One 😀 " }, call(2), result),
    cut({ kind: "text", text: "and two" }, call(4), result),
  ];
  app.send("Count");
  await settled();
  app.continueAnswer(active(), active().messages.value[1]!);
  await settled();
  const events = [call(2), result].map((part) => part.kind === "tool" && part.event);
  expect(api.requests[1]!.messages).toEqual([
    { role: "user", content: "Count" },
    { role: "assistant", content: "One 😀 ", nanochat: { tool_events: events } },
  ]);
  expect(lastAnswer().content).toBe("One 😀 and two");
  expect(lastAnswer().toolEvents).toMatchObject([
    ...events,
    { type: "call", call_index: 1, offset: 10 },
    { type: "result", call_index: 1 },
  ]);
});

test("token counts that come with the text give a rate before the end", async () => {
  const counted: Reply = async function* () {
    yield { kind: "text", text: "Well" };
    yield { kind: "usage", usage: { prompt_tokens: 3, completion_tokens: 1 } };
    yield* lingers(api.requests[0]!, new AbortController().signal);
  };
  api.replies = [counted];
  app.send("Hi");
  await settled();
  await vi.waitFor(() => expect(lastAnswer()).toMatchObject({ state: "streaming", usage: { completion_tokens: 1 } }));
  expect(lastAnswer().seconds).toBeGreaterThanOrEqual(0);
});

test("a busy server is asked again after the time it names", async () => {
  api.replies = [fails(new ApiError("busy", { status: 429, retryAfterSeconds: 5 })), says("Now.")];
  app.send("Hi");
  await settled();
  expect(app.busy.current.value).not.toBeNull();
  await vi.advanceTimersByTimeAsync(4_900);
  expect(api.requests).toHaveLength(1);
  await vi.advanceTimersByTimeAsync(200);
  expect(app.busy.current.value).toBeNull();
  expect(lastAnswer()).toMatchObject({ content: "Now.", state: "complete" });
});

test("a wait can be cut short or given up", async () => {
  api.replies = [fails(new ApiError("busy", { status: 429, retryAfterSeconds: 50 }))];
  app.send("Hi");
  await settled();
  app.busy.current.value!.retryNow();
  await settled();
  expect(api.requests).toHaveLength(2);
  app.stop(active());
  await settled();
  expect(lastAnswer().state).toBe("stopped");
  expect(app.busy.current.value).toBeNull();
});

test("a server that stays busy is reported in the end", async () => {
  api.replies = [fails(new ApiError("queue is full", { status: 503, retryAfterSeconds: 1 }))];
  app.send("Hi");
  await vi.advanceTimersByTimeAsync(60_000);
  expect(lastAnswer().problem).toEqual({ kind: "busy", detail: "queue is full" });
  expect(api.requests.length).toBeGreaterThan(2);
});

test("a message that waits for a loading model goes out as soon as the model is ready", async () => {
  api.ready = () => Promise.resolve({ status: 503, waitsFor: null });
  api.replies = [fails(new ApiError("loading", { status: 503, retryAfterSeconds: 50 })), says("Here.")];
  app.send("Hi");
  await settled();
  expect(app.health.state.value).toBe("loading");
  api.ready = READY;
  await vi.advanceTimersByTimeAsync(2_100);
  expect(app.health.state.value).toBe("ready");
  expect(lastAnswer().content).toBe("Here.");
});

test("a message waits for a loading model as long as that takes", async () => {
  const loading = new ApiError("No engine is ready", { status: 503, code: "engine_unavailable", retryAfterSeconds: 2 });
  api.replies = [...Array.from({ length: 50 }, () => fails(loading)), says("Here.")];
  app.send("Hi");
  await vi.advanceTimersByTimeAsync(90_000);
  expect(lastAnswer().state).toBe("streaming");
  await vi.advanceTimersByTimeAsync(30_000);
  expect(lastAnswer()).toMatchObject({ content: "Here.", state: "complete" });
});

test("the page marks where the model's memory begins, until it sees all again", async () => {
  for (const text of ["One", "Two"]) {
    app.send(text);
    await settled();
  }
  api.replies = [
    async function* () {
      yield { kind: "left-out", turns: 2 };
      yield { kind: "text", text: "Three?" };
    },
    says("All."),
  ];
  app.send("Three");
  await settled();
  expect(api.requests[2]).toMatchObject({ truncation: "auto" });
  const second = active().messages.value[2]!.value;
  expect(second.content).toBe("Two");
  expect(active().memoryStart.value).toBe(second.id);
  app.regenerate(active(), active().messages.value.at(-1)!);
  await settled();
  expect(active().memoryStart.value).toBeUndefined();
});

test("while the server lets a message wait, the page says what for", async () => {
  const waitsFor = "No engine has been found yet.";
  let answer: () => void = () => undefined;
  api.replies = [
    async function* () {
      await new Promise<void>((resolve) => (answer = resolve));
      yield { kind: "text", text: "Here." };
    },
  ];
  await settled();
  api.ready = () => Promise.resolve({ status: 200, waitsFor });
  app.send("Hi");
  await vi.advanceTimersByTimeAsync(2_100);
  expect(app.health.state.value).toBe("loading");
  expect(app.health.waitsFor.value).toBe(waitsFor);
  api.ready = READY;
  answer();
  await vi.advanceTimersByTimeAsync(2_100);
  expect(app.health.state.value).toBe("ready");
  expect(lastAnswer().content).toBe("Here.");
});

test("a lost server is noticed by the first request and its return by itself", async () => {
  await settled();
  expect(app.health.state.value).toBe("ready");
  const gone = new ConnectionError("the server could not be reached");
  api.ready = () => Promise.reject(gone);
  api.replies = [fails(gone)];
  app.send("Hi");
  await settled();
  expect(lastAnswer().problem!.kind).toBe("unreachable");
  expect(app.health.state.value).toBe("unreachable");
  api.ready = READY;
  await vi.advanceTimersByTimeAsync(2_100);
  expect(app.health.state.value).toBe("ready");
});

test.each([
  [new ApiError("2048 tokens at most", { status: 400, code: "context_length_exceeded" }), "context"],
  [new ApiError("1 MB at most", { status: 413 }), "context"],
  [new ApiError("no key", { status: 401 }), "key"],
  [new ApiError("bad seed", { status: 400 }), "rejected"],
] as const)("what the server refuses (%s) is told apart", async (error, kind) => {
  api.replies = [fails(error)];
  app.send("Hi");
  await settled();
  expect(lastAnswer().problem).toEqual({ kind, detail: error.message });
});

test("an edited question begins another branch, and the earlier one stays", async () => {
  for (const text of ["One", "Two", "Three"]) {
    app.send(text);
    await settled();
  }
  api.replies = [says("New.")];
  app.edit(active(), active().messages.value[0]!, "Uno");
  await settled();
  expect(contents()).toEqual(["Uno", "New."]);
  expect(active().title.value).toBe("Uno");
  const versions = active().versionsOf(active().messages.value[0]!);
  expect(versions.map((version) => version.value.content)).toEqual(["One", "Uno"]);
  app.show(active(), versions[0]!);
  expect(contents()).toEqual(["One", "Hello.", "Two", "Hello.", "Three", "Hello."]);
});

test("a title that a person chose survives an edit", async () => {
  app.send("One");
  await settled();
  app.rename(active(), "Mine");
  app.edit(active(), active().messages.value[0]!, "Uno");
  expect(active().title.value).toBe("Mine");
});

test("a deleted conversation stops, is gone after a reload, and comes back on undo", async () => {
  api.replies = [lingers];
  app.send("Hi");
  await settled();
  const conversation = active();
  app.remove(conversation);
  await settled();
  expect(app.activeId.value).toBeNull();
  const reopened = open();
  reopened.health.stop();
  expect(reopened.conversations.value).toEqual([]);
  app.toast.value!.undo!();
  expect(active()).toBe(conversation);
  expect(new ConversationStore(localStorage).load()[0]!.messages[1]).toMatchObject({
    content: "Well",
    state: "stopped",
  });
});

test("leaving the page makes a deletion final", async () => {
  app.send("Hi");
  await settled();
  app.remove(active());
  app.library.close();
  expect(Object.keys(localStorage).filter((key) => key.startsWith("nanochat.message."))).toEqual([]);
});

test("what has arrived is stored when the page may close, and the answer goes on", async () => {
  api.replies = [lingers];
  app.send("Hi");
  await settled();
  await vi.waitFor(() => expect(lastAnswer().content).toBe("Well"));
  app.library.saveUnfinished();
  const stored = new ConversationStore(localStorage).load()[0]!.messages[1];
  expect(stored).toMatchObject({ content: "Well", state: "streaming" });
  expect(lastAnswer().state).toBe("streaming");
});

test("leaving the page keeps what has arrived", async () => {
  api.replies = [lingers];
  app.send("Hi");
  await settled();
  await vi.waitFor(() => expect(lastAnswer().content).toBe("Well"));
  app.library.close();
  expect(new ConversationStore(localStorage).load()[0]!.messages[1]).toMatchObject({
    content: "Well",
    state: "interrupted",
  });
});
