import { expect, test } from "vitest";
import type { ToolEvent } from "../src/api/wire";
import { assistantMessage, userMessage, type Message } from "../src/chat/conversation";
import { requestMessages } from "../src/chat/history";

const CALL: ToolEvent = { type: "call", call_index: 0, code: "6 * 7", offset: 3 };
const RESULT: ToolEvent = { type: "result", call_index: 0, status: "ok", output: "42", duration_seconds: 0.1 };

function answer(content: string, toolEvents: ToolEvent[] = []): Message {
  return { ...assistantMessage(), state: "complete", content, toolEvents };
}

test("an answer goes back with the tool events that it came with", () => {
  expect(requestMessages([userMessage("6 * 7?"), answer("It is 42.", [CALL, RESULT])], "Be brief.")).toEqual([
    { role: "system", content: "Be brief." },
    { role: "user", content: "6 * 7?" },
    { role: "assistant", content: "It is 42.", nanochat: { tool_events: [CALL, RESULT] } },
  ]);
});

test("a blank system prompt and an answer without tools add nothing", () => {
  expect(requestMessages([userMessage("Hi"), answer("Hello")], "  ")).toEqual([
    { role: "user", content: "Hi" },
    { role: "assistant", content: "Hello" },
  ]);
});

test("turns alternate even when an answer never came", () => {
  const messages = [
    userMessage("Hi"),
    answer("", [CALL]),
    userMessage("Are you there?"),
    answer(""),
    userMessage("Hm"),
  ];
  expect(requestMessages(messages, "")).toEqual([{ role: "user", content: "Hi\n\nAre you there?\n\nHm" }]);
});
