import { expect, test } from "vitest";
import type { ToolEvent } from "../src/api/wire";
import { assistantMessage, userMessage, type Message } from "../src/chat/message";
import { newestTurns, requestMessages, turnsOf } from "../src/chat/history";

const CALL: ToolEvent = { type: "call", call_index: 0, code: "6 * 7", offset: 3 };
const RESULT: ToolEvent = { type: "result", call_index: 0, status: "ok", output: "42", duration_seconds: 0.1 };

function answer(content: string, toolEvents: ToolEvent[] = []): Message {
  return { ...assistantMessage(), state: "complete", content, toolEvents };
}

test("an answer goes back with the tool events that it came with", () => {
  expect(requestMessages(turnsOf([userMessage("6 * 7?"), answer("It is 42.", [CALL, RESULT])]), "Be brief.")).toEqual([
    { role: "system", content: "Be brief." },
    { role: "user", content: "6 * 7?" },
    { role: "assistant", content: "It is 42.", nanochat: { tool_events: [CALL, RESULT] } },
  ]);
});

test("pictures do not go back, and the page keeps them", () => {
  const pictures = [{ name: "figure-1.png", media_type: "image/png", data: "cGl4" }];
  const drawn = { ...RESULT, pictures } as ToolEvent;
  const message = answer("It is 42.", [CALL, drawn]);
  expect(requestMessages(turnsOf([userMessage("6 * 7?"), message]), "")[1]!.nanochat).toEqual({
    tool_events: [CALL, RESULT],
  });
  expect(message).toMatchObject({ toolEvents: [CALL, drawn] });
});

test("a blank system prompt and an answer without tools add nothing", () => {
  expect(requestMessages(turnsOf([userMessage("Hi"), answer("Hello")]), "  ")).toEqual([
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
  expect(requestMessages(turnsOf(messages), "")).toEqual([{ role: "user", content: "Hi\n\nAre you there?\n\nHm" }]);
});

test("a question that was too long is no part of what follows, but is asked again if the person wants that", () => {
  const refused: Message = {
    ...assistantMessage(),
    state: "interrupted",
    problem: { kind: "context", detail: "256 tokens at most" },
  };
  const asked = [userMessage("Hi"), answer("Hello"), userMessage("long"), refused];
  const sent = (messages: Message[]) => requestMessages(turnsOf(messages), "").map(({ content }) => content);
  expect(sent([...asked, userMessage("short")])).toEqual(["Hi", "Hello", "short"]);
  expect(sent(asked.slice(0, -1))).toEqual(["Hi", "Hello", "long"]);
});

test("what no request has room for is left out from the beginning, up to a question", () => {
  const messages = Array.from({ length: 6 }, (_, index) =>
    index % 2 === 0 ? userMessage(`${index}`.repeat(50_000)) : answer(`${index}`.repeat(50_000)),
  );
  const turns = turnsOf(messages);
  expect(newestTurns(turns).map((turn) => turn.message.content[0])).toEqual(["4", "5"]);
  expect(newestTurns(turns.slice(3))).toEqual(turns.slice(4));
  expect(newestTurns(turns.slice(0, 1))).toEqual(turns.slice(0, 1));
});

test("the last question always stays, however long it is", () => {
  const turns = turnsOf([userMessage("Hi"), answer("Hello"), userMessage("x".repeat(300_000))]);
  expect(newestTurns(turns)).toEqual(turns.slice(2));
});
