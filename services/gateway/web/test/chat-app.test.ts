// @vitest-environment jsdom
import { signal } from "@preact/signals";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import type { Api, Readiness } from "../src/api/api";
import { ApiError, ConnectionError } from "../src/api/errors";
import type { ChatPart, ChatRequest } from "../src/api/wire";
import { ChatApp } from "../src/chat/chat-app";
import type { AssistantMessage, Conversation } from "../src/chat/conversation";
import { ConversationStore } from "../src/storage/conversation-store";
import { DEFAULTS } from "../src/storage/settings";

const READY = () => Promise.resolve({ status: 200, waitsFor: null });

type Reply = (request: ChatRequest, signal: AbortSignal) => AsyncGenerator<ChatPart>;

/** Stands in for the server: answers each request with the next reply, the last one for ever. */
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

test("an interrupted answer keeps its text, and asking again replaces it", async () => {
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
  [new ApiError("no key", { status: 401 }), "key"],
  [new ApiError("bad seed", { status: 400 }), "rejected"],
] as const)("what the server refuses (%s) is told apart", async (error, kind) => {
  api.replies = [fails(error)];
  app.send("Hi");
  await settled();
  expect(lastAnswer().problem).toEqual({ kind, detail: error.message });
});

test("an edited question replaces what followed it, and undo brings that back", async () => {
  for (const text of ["One", "Two", "Three"]) {
    app.send(text);
    await settled();
  }
  api.replies = [says("New.")];
  app.edit(active(), active().messages.value[0]!, "Uno");
  await settled();
  expect(contents()).toEqual(["Uno", "New."]);
  expect(active().title.value).toBe("Uno");
  app.toast.value!.undo!();
  expect(contents()).toEqual(["One", "Hello.", "Two", "Hello.", "Three", "Hello."]);
  expect(active().title.value).toBe("One");
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
  expect(new ConversationStore(localStorage).load()).toEqual([]);
  app.toast.value!.undo!();
  expect(active()).toBe(conversation);
  expect(new ConversationStore(localStorage).load()[0]!.messages[1]).toMatchObject({
    content: "Well",
    state: "stopped",
  });
});

test("another tab's changes are taken over, but not into an answer that is being written here", async () => {
  app.send("Hi");
  await settled();
  const stored = active().toStored();
  app.adopt(stored.id, { ...stored, title: "Renamed there" });
  expect(active().title.value).toBe("Renamed there");
  api.replies = [lingers];
  app.send("More");
  await settled();
  app.adopt(stored.id, null);
  expect(active().messages.value).toHaveLength(4);
});

test("leaving the page keeps what has arrived", async () => {
  api.replies = [lingers];
  app.send("Hi");
  await settled();
  await vi.waitFor(() => expect(lastAnswer().content).toBe("Well"));
  app.saveRunning();
  expect(new ConversationStore(localStorage).load()[0]!.messages[1]).toMatchObject({
    content: "Well",
    state: "interrupted",
  });
});
