// @vitest-environment jsdom
import { signal, type Signal } from "@preact/signals";
import { render } from "preact";
import { expect, test } from "vitest";
import { Conversation } from "../src/chat/conversation";
import { assistantMessage, type AssistantMessage as Answer, type Message } from "../src/chat/message";
import { AssistantMessage } from "../src/components/AssistantMessage";
import { PageContext, type Page } from "../src/components/context";

async function show(change: Partial<Answer>, last = true) {
  const root = document.createElement("div");
  const conversation = Conversation.begin("x");
  const message = conversation.add([{ ...assistantMessage(), ...change }])[0]!;
  const page = {
    app: { show: (shown: Conversation, version: Signal<Message>) => shown.choose(version.peek()) },
    lessons: { offered: signal(false) },
  };
  render(
    <PageContext.Provider value={page as unknown as Page}>
      <AssistantMessage conversation={conversation} message={message} last={last} />
    </PageContext.Provider>,
    root,
  );
  return { root, conversation, message, find: (id: string) => root.querySelector(`[data-testid=${id}]`) };
}

test("a tool card stands between the words around it, runs, and then shows its output", async () => {
  const call = { type: "call", call_index: 0, code: "1 < 2", offset: 6 } as const;
  const { root, message, find } = await show({ content: "Let me", toolEvents: [call] });
  expect(find("tool-card")!.getAttribute("data-state")).toBe("running");
  expect(find("tool-code")!.textContent).toBe("1 < 2");
  expect(find("tool-output")).toBeNull();

  const result = {
    type: "result",
    call_index: 0,
    status: "ok",
    output: "<b>True</b>",
    duration_seconds: 0.002,
  } as const;
  const card = find("tool-card");
  message.value = {
    ...(message.value as Answer),
    content: "Let me see.",
    toolEvents: [call, result],
    state: "complete",
  };
  await new Promise((resolve) => setTimeout(resolve));
  expect(find("tool-card")).toBe(card);
  expect(find("tool-output")!.textContent).toBe("<b>True</b>");
  expect(root.querySelector(".tool-status")!.textContent).toBe("Done · 2 ms");
  const order = Array.from(root.querySelectorAll(".prose, .tool-card"), (element) => element.textContent!.trim());
  expect([order[0], order[2]]).toEqual(["Let me", "see."]);
});

test("a call shows the pictures that it made", async () => {
  const pictures = [
    { name: "figure-1.png", media_type: "image/png", data: "cGl4" },
    { name: "result.svg", media_type: "image/svg+xml", data: "PHN2Zy8+" },
  ];
  const toolEvents: Answer["toolEvents"] = [
    { type: "call", call_index: 0, code: "plot()", offset: 0 },
    { type: "result", call_index: 0, status: "ok", output: "", duration_seconds: 0.5, pictures },
  ];
  const { root } = await show({ toolEvents, state: "complete" });
  const shown = Array.from(root.querySelectorAll<HTMLImageElement>("[data-testid=tool-picture]"));
  expect(shown.map((image) => [image.alt, image.src])).toEqual([
    ["figure-1.png", "data:image/png;base64,cGl4"],
    ["result.svg", "data:image/svg+xml;base64,PHN2Zy8+"],
  ]);
});

test("a failed call says how, and one that the answer left behind is not shown as running", async () => {
  const toolEvents: Answer["toolEvents"] = [
    { type: "call", call_index: 0, code: "while True: pass", offset: 0 },
    { type: "result", call_index: 0, status: "timeout", output: "", duration_seconds: 5 },
    { type: "call", call_index: 1, code: "1", offset: 0 },
  ];
  const { root } = await show({ toolEvents, state: "stopped" });
  const states = Array.from(
    root.querySelectorAll<HTMLElement>("[data-testid=tool-card]"),
    (card) => card.dataset.state,
  );
  expect(states).toEqual(["failed", "unfinished"]);
  expect(root.querySelector(".tool-status")!.textContent).toBe("Took too long · 5.0 s");
});

test("only the last answer can be written again, and usage is told in few words", async () => {
  const done: Partial<Answer> = {
    content: "Hi",
    state: "complete",
    usage: { prompt_tokens: 9, completion_tokens: 41 },
    seconds: 2,
  };
  expect((await show(done, false)).find("regenerate")).toBeNull();
  const { root, find } = await show(done);
  expect(find("regenerate")).not.toBeNull();
  expect(root.querySelector(".footnotes")!.textContent).toBe("41 tokens · 20 tokens/s");
});

test("an interrupted answer says why and offers to try again", async () => {
  const problem = { kind: "interrupted", detail: "the engine is gone" } as const;
  const { root, find } = await show({ content: "Half", state: "interrupted", problem });
  expect(root.querySelector("[role=alert]")!.textContent).toContain("The answer was interrupted: the engine is gone");
  expect(find("retry")).not.toBeNull();
  expect(find("regenerate")).toBeNull();
});

test("versions are counted and led through, and a failed try without a word is none of them", async () => {
  const { conversation, message, find, root } = await show({ content: "First", state: "complete" });
  expect(find("versions")).toBeNull();
  const failed = { ...assistantMessage(), state: "interrupted" as const };
  conversation.add([failed]);
  expect(conversation.versionsOf(message)).toHaveLength(1);
  conversation.add([{ ...assistantMessage(), createdAt: Date.now() + 1, content: "Second", state: "complete" }]);
  await new Promise((resolve) => setTimeout(resolve));
  expect(find("versions")!.textContent).toBe("1/2");
  root.querySelector<HTMLElement>("[aria-label='Later version']")!.click();
  expect(conversation.snapshot().map((shown) => shown.content)).toEqual(["Second"]);
});

test.each([
  [{ state: "complete", finishReason: "length" }, true],
  [{ state: "stopped" }, true],
  [{ state: "complete", finishReason: "stop" }, false],
] as const)("an answer that ended as %j offers to go on: %s", async (ending, offered) => {
  const { find } = await show({ content: "Half an", ...ending });
  expect(find("continue") !== null).toBe(offered);
});

test("while an answer is written, its rate is shown", async () => {
  const usage = { prompt_tokens: 5, completion_tokens: 31 };
  const { find } = await show({ content: "Well", usage, seconds: 1.5 });
  expect(find("footnotes")!.textContent).toBe("31 tokens · 20 tokens/s");
});
