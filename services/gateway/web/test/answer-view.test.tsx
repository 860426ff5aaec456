// @vitest-environment jsdom
import { signal } from "@preact/signals";
import { render } from "preact";
import { expect, test } from "vitest";
import {
  assistantMessage,
  Conversation,
  type AssistantMessage as Answer,
  type Message,
} from "../src/chat/conversation";
import { AssistantMessage } from "../src/components/AssistantMessage";
import { PageContext, type Page } from "../src/components/context";

async function show(change: Partial<Answer>, last = true) {
  const root = document.createElement("div");
  const message = signal<Message>({ ...assistantMessage(), ...change });
  const page = { app: {} } as unknown as Page;
  const conversation = Conversation.begin("x");
  render(
    <PageContext.Provider value={page}>
      <AssistantMessage conversation={conversation} message={message} last={last} />
    </PageContext.Provider>,
    root,
  );
  return { root, message, find: (id: string) => root.querySelector(`[data-testid=${id}]`) };
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
