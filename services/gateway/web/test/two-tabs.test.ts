// @vitest-environment jsdom
import { signal } from "@preact/signals";
import fc from "fast-check";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import type { Api } from "../src/api/api";
import { ConnectionError } from "../src/api/errors";
import type { ChatPart, ChatRequest } from "../src/api/wire";
import { ChatApp } from "../src/chat/chat-app";
import type { AssistantMessage } from "../src/chat/message";
import { ConversationStore } from "../src/storage/conversation-store";
import { DEFAULTS } from "../src/storage/settings";
import { TestBrowser, type BrowserTab } from "./browser";

beforeEach(() => {
  vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout", "Date", "performance"] });
  vi.stubGlobal("requestAnimationFrame", (draw: FrameRequestCallback) => {
    queueMicrotask(() => draw(0));
    return 1;
  });
});

afterEach(() => {
  vi.useRealTimers();
  vi.unstubAllGlobals();
});

/** An answer that the server is writing. */
class Stream {
  private wake: () => void = () => undefined;
  private readonly parts: ChatPart[] = [];
  private end: "done" | Error | null = null;

  constructor(readonly owner: Tab) {}

  get open(): boolean {
    return this.end === null;
  }

  say(text: string): void {
    this.parts.push({ kind: "text", text });
    this.wake();
  }

  finish(end: "done" | Error): void {
    this.end ??= end;
    this.wake();
  }

  async *read(abort: AbortSignal): AsyncGenerator<ChatPart> {
    abort.addEventListener("abort", () => this.finish(abort.reason as Error));
    for (;;) {
      while (this.parts.length > 0) yield this.parts.shift()!;
      if (this.end === "done") return;
      if (this.end) throw this.end;
      await new Promise<void>((resolve) => (this.wake = resolve));
    }
  }
}

/** The page in one tab. */
class Tab {
  app!: ChatApp;
  inner!: BrowserTab;

  constructor(
    private readonly browser: TestBrowser,
    private readonly streams: Stream[],
  ) {
    this.open();
  }

  open(): void {
    this.inner = this.browser.open();
    const api = {
      readiness: () => Promise.resolve({ status: 200, waitsFor: null }),
      models: () => Promise.resolve([{ id: "demo" }]),
      chat: (_: ChatRequest, abort: AbortSignal) => {
        const stream = new Stream(this);
        this.streams.push(stream);
        return stream.read(abort);
      },
    };
    const store = new ConversationStore(this.inner.storage);
    this.app = new ChatApp(api as unknown as Api, store, signal({ ...DEFAULTS }), this.inner);
    this.app.start();
    const { library } = this.app;
    store.watch(this.inner.window as Window, {
      header: (header) => library.adoptHeader(header),
      message: (conversation, message) => library.adoptMessage(conversation, message),
    });
  }

  /** Loads the page again. If it crashes, it stores nothing before. */
  reload(crash: boolean): void {
    const active = this.app.activeId.peek();
    if (!crash) this.app.library.close();
    this.close();
    this.open();
    this.app.activeId.value = active;
  }

  close(): void {
    this.app.health.stop();
    this.browser.close(this.inner);
    // The connections of a closed page break, and its code no longer runs.
    for (const stream of this.streams.splice(0)) if (stream.owner !== this) this.streams.push(stream);
  }

  deliver(most: number): void {
    this.inner.deliver(most);
  }

  /** The complete answers that the person can see, by their ids. */
  shown(): Map<string, string> {
    const answers = this.app.conversations.peek().flatMap((conversation) => conversation.snapshot());
    const complete = answers.filter((answer) => answer.role === "assistant" && answer.state === "complete");
    return new Map(complete.map((answer) => [answer.id, answer.content]));
  }

  /** All complete answers, also in versions that are not shown. */
  kept(): Map<string, string> {
    const all = this.app.conversations.peek().flatMap((conversation) => conversation.toStored().messages);
    return new Map(all.filter((m) => (m as AssistantMessage).state === "complete").map((m) => [m.id, m.content]));
  }
}

const STEPS = [
  "send",
  "send",
  "word",
  "word",
  "finish",
  "finish",
  "stop",
  "regenerate",
  "edit",
  "continue",
  "version",
  "new chat",
  "delete",
  "undo",
  "reload",
  "crash",
  "kill the server",
  "deliver",
  "deliver",
] as const;

const steps = fc.array(fc.record({ step: fc.constantFrom(...STEPS), tab: fc.constantFrom(0, 1), pick: fc.nat(30) }), {
  minLength: 30,
  maxLength: 90,
});

interface Step {
  step: (typeof STEPS)[number];
  tab: 0 | 1;
  pick: number;
}

/** Scripts that once lost an answer or left the tabs in disagreement; each step is followed by its tab and its pick. */
const EXAMPLES = [
  // A tab answered an old header with a merge that overwrote a newer one, and both tabs were loaded again.
  "send 0 0, deliver 1 0, finish 0 0, new chat 1 0, delete 1 0, undo 1 0, deliver 0 0, crash 0 0, crash 1 0",
  "send 0 0, deliver 1 0, continue 0 0, delete 0 0, new chat 1 0, undo 1 0, edit 1 0, reload 0 0, deliver 1 1," +
    "finish 0 0, deliver 1 3, reload 1 0",
  "send 1 0, deliver 0 0, new chat 0 0, finish 1 0, delete 0 0, undo 1 0, deliver 1 0, reload 1 0, reload 0 0",
  // The tab that heard of the newer header did not store it again, so only tabs that were open knew it.
  "send 0 0, deliver 1 0, new chat 1 0, edit 1 0, deliver 0 2, reload 1 0",
  "send 0 0, send 1 0, deliver 0 1, new chat 0 1, regenerate 0 0, regenerate 1 0, deliver 0 0, reload 1 0",
  // A tab whose deletion was taken back made the later deletion of another tab final, which was taken back too.
  "send 1 0, delete 1 0, crash 0 0, new chat 0 0, delete 0 0, deliver 1 0, reload 1 0",
  "send 0 0, reload 1 0, new chat 1 0, delete 1 0, undo 0 0, delete 0 0, deliver 1 0, reload 1 0",
].flatMap((text): [Step[], boolean][] => [true, false].map((hasLocks) => [parseScript(text), hasLocks]));

function parseScript(text: string): Step[] {
  return text.split(/, ?/).map((line) => {
    const [, step, tab, pick] = /^(.+) ([01]) (\d+)$/.exec(line)!;
    return { step: STEPS.find((known) => known === step)!, tab: tab === "0" ? 0 : 1, pick: Number(pick) } as const;
  });
}

async function settle(): Promise<void> {
  await vi.advanceTimersByTimeAsync(1);
}

test("in two tabs, nothing that was shown complete is ever lost, and both agree in the end", async () => {
  await fc.assert(
    fc.asyncProperty(steps, fc.boolean(), async (script, hasLocks) => {
      const browser = new TestBrowser(hasLocks);
      const streams: Stream[] = [];
      const tabs = [new Tab(browser, streams), new Tab(browser, streams)];
      try {
        await play(script, browser, streams, tabs);
      } finally {
        tabs.forEach((tab) => tab.close());
        vi.clearAllTimers(); // otherwise each run would be slower than the one before it
      }
    }),
    // This limit is below the test's time limit, so that a failure is reported with its script, although perhaps not
    // with the smallest script.
    { numRuns: 200, examples: EXAMPLES, interruptAfterTimeLimit: 45_000, markInterruptAsFailure: true },
  );
}, 60_000);

async function play(script: readonly Step[], browser: TestBrowser, streams: Stream[], tabs: Tab[]): Promise<void> {
  const shown = new Map<string, string>();
  const undo: (() => void)[] = [];
  let words = 0;
  await settle();
  for (const { step, tab: index, pick } of script) {
    const tab = tabs[index]!;
    const { app } = tab;
    const open = app.active.peek();
    const messages = open?.messages.peek() ?? [];
    const role = (wanted: string) => messages.filter((message) => message.peek().role === wanted);
    const live = streams.filter((stream) => stream.open);
    const stream = live[pick % live.length];
    if (step === "send") app.send(`Question ${(words += 1)}`);
    else if (step === "word") stream?.say(`word${(words += 1)} `);
    else if (step === "finish") stream?.finish("done");
    else if (step === "stop" && open?.writing.peek()) app.stop(open);
    else if (step === "regenerate" && role("assistant").length > 0) app.regenerate(open!, role("assistant").at(-1)!);
    else if (step === "continue" && role("assistant").length > 0) app.continueAnswer(open!, role("assistant").at(-1)!);
    else if (step === "edit" && role("user").length > 0) {
      app.edit(open!, role("user")[pick % role("user").length]!, `Edited ${(words += 1)}`);
    } else if (step === "version" && messages.length > 0) {
      const versions = open!.versionsOf(messages[pick % messages.length]!);
      app.show(open!, versions[pick % versions.length]!);
    } else if (step === "new chat") {
      const all = app.conversations.peek();
      app.activeId.value = all[pick % (all.length + 1)]?.id ?? null;
    } else if (step === "delete" && open) {
      app.remove(open);
      undo.push(app.toast.peek()!.undo!);
    } else if (step === "undo") undo.pop()?.();
    else if (step === "reload" || step === "crash") {
      undo.splice(0).forEach((takeBack) => takeBack()); // otherwise, the deletion would be final after the reload
      tab.reload(step === "crash");
    } else if (step === "kill the server") live.forEach((each) => each.finish(new ConnectionError("gone")));
    else if (step === "deliver") tab.deliver(1 + (pick % 4));
    await settle();
    for (const each of tabs) for (const [id, content] of each.shown()) shown.set(id, content);
  }
  streams.forEach((stream) => stream.finish("done"));
  undo.splice(0).forEach((takeBack) => takeBack());
  await settle();
  for (let round = 0; round < 4; round += 1) {
    browser.deliverAll();
    await vi.advanceTimersByTimeAsync(5_000); // unfinished answers without a writer become interrupted
  }
  tabs.push(new Tab(browser, streams)); // a tab that is opened now must see the same, too
  await settle();
  for (const tab of tabs) {
    const kept = tab.kept();
    for (const [id, content] of shown) expect(kept.get(id)).toBe(content);
    expect(state(tab)).toEqual(state(tabs[0]!));
  }
}

/** What a tab knows of all conversations, in a fixed order. */
function state(tab: Tab): unknown {
  const stored = tab.app.conversations.peek().map((conversation) => conversation.toStored());
  stored.sort((a, b) => (a.header.id < b.header.id ? -1 : 1));
  return stored.map(({ header, messages }) => [header, messages.toSorted((a, b) => (a.id < b.id ? -1 : 1))]);
}

function pair(hasLocks = true): { browser: TestBrowser; streams: Stream[]; a: Tab; b: Tab } {
  const browser = new TestBrowser(hasLocks);
  const streams: Stream[] = [];
  const a = new Tab(browser, streams);
  return { browser, streams, a, b: new Tab(browser, streams) };
}

function lastAnswer(tab: Tab): AssistantMessage {
  return tab.app.conversations.peek()[0]!.snapshot().at(-1) as AssistantMessage;
}

test("another tab sees an answer grow, calls it running, and can stop it", async () => {
  const { browser, streams, a, b } = pair();
  await settle();
  a.app.send("Hi");
  await settle();
  streams[0]!.say("One ");
  await vi.advanceTimersByTimeAsync(1_100);
  streams[0]!.say("two");
  await settle();
  browser.deliverAll();
  b.app.activeId.value = b.app.conversations.peek()[0]!.id;
  expect(lastAnswer(b)).toMatchObject({ content: "One two", state: "streaming" });
  expect(b.app.active.peek()!.writing.peek()).toBe(true);
  await vi.advanceTimersByTimeAsync(10_000); // meanwhile, this tab asks the other tab
  expect(lastAnswer(b).state).toBe("streaming");
  b.app.stop(b.app.active.peek()!);
  await settle();
  browser.deliverAll();
  expect(lastAnswer(a)).toMatchObject({ content: "One two", state: "stopped" });
  expect(lastAnswer(b)).toMatchObject({ content: "One two", state: "stopped" });
});

test("an answer stays running while its tab is too busy to reply, until the tab crashes", async () => {
  const { browser, streams, a, b } = pair();
  await settle();
  a.app.send("Hi");
  await settle();
  a.inner.busy = true;
  browser.deliverAll();
  await vi.advanceTimersByTimeAsync(120_000);
  expect(lastAnswer(b).state).toBe("streaming");
  expect(streams[0]!.open).toBe(true);
  a.close();
  await vi.advanceTimersByTimeAsync(10_000);
  expect(lastAnswer(b).state).toBe("interrupted");
});

test("the lock of an answer is released when the answer has ended", async () => {
  const { browser, streams, a } = pair();
  await settle();
  a.app.send("Hi");
  await settle();
  expect([...browser.locks.keys()]).toEqual([`nanochat.answer.${lastAnswer(a).id}`]);
  streams[0]!.finish(new ConnectionError("gone"));
  await settle();
  expect(browser.locks.size).toBe(0);
});

test("without locks, the answer of a tab that does not reply is interrupted until it is complete", async () => {
  const { browser, streams, a, b } = pair(false);
  await settle();
  a.app.send("Hi");
  await settle();
  a.inner.busy = true;
  browser.deliverAll();
  await vi.advanceTimersByTimeAsync(10_000);
  expect(lastAnswer(b).state).toBe("interrupted");
  a.inner.busy = false;
  streams[0]!.say("One");
  streams[0]!.finish("done");
  await settle();
  browser.deliverAll();
  expect(lastAnswer(b)).toMatchObject({ content: "One", state: "complete" });
});

test.each([true, false])("an answer whose tab has crashed becomes interrupted (locks: %s)", async (hasLocks) => {
  const { browser, streams, a, b } = pair(hasLocks);
  await settle();
  a.app.send("Hi");
  await settle();
  streams[0]!.say("One");
  await vi.advanceTimersByTimeAsync(1_100);
  streams[0]!.say(" two");
  await settle();
  browser.deliverAll();
  a.close();
  await vi.advanceTimersByTimeAsync(10_000);
  expect(lastAnswer(b)).toMatchObject({ content: "One two", state: "interrupted" });
});

test("a tab that hears too late that an answer is complete stores it again", async () => {
  const { browser, streams, a, b } = pair();
  await settle();
  a.app.send("Hi");
  await settle();
  browser.deliverAll();
  streams[0]!.say("One");
  streams[0]!.finish("done");
  await settle();
  a.close();
  await vi.advanceTimersByTimeAsync(10_000);
  expect(lastAnswer(b)).toMatchObject({ content: "", state: "interrupted" });
  browser.deliverAll();
  expect(lastAnswer(b)).toMatchObject({ content: "One", state: "complete" });
  expect(lastAnswer(new Tab(browser, streams))).toMatchObject({ content: "One", state: "complete" });
});

test("two tabs that send at the same time make two versions", async () => {
  const { browser, streams, a, b } = pair();
  await settle();
  a.app.send("Hi");
  await settle();
  streams[0]!.say("Hello.");
  streams[0]!.finish("done");
  await settle();
  browser.deliverAll();
  b.app.activeId.value = a.app.activeId.value;
  a.app.send("From A");
  b.app.send("From B");
  await settle();
  for (const [index, stream] of streams.slice(1).entries()) {
    stream.say(`Answer ${index}`);
    stream.finish("done");
  }
  await settle();
  browser.deliverAll();
  for (const tab of [a, b]) {
    const conversation = tab.app.conversations.peek()[0]!;
    const question = conversation.messages.peek()[2]!;
    expect(
      conversation
        .versionsOf(question)
        .map((version) => version.peek().content)
        .sort(),
    ).toEqual(["From A", "From B"]);
    expect([...tab.kept().values()].sort()).toEqual(["Answer 0", "Answer 1", "Hello."]);
  }
});
