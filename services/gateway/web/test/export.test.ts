import { expect, test } from "vitest";
import type { ToolEvent } from "../src/api/wire";
import { Conversation } from "../src/chat/conversation";
import { fileName, toJson, toMarkdown } from "../src/chat/export";
import { newHeader } from "../src/chat/merge";
import { assistantMessage, userMessage, type AssistantMessage, type Message } from "../src/chat/message";

function conversation(): Conversation {
  const question = userMessage("How many?");
  const answer: Message = {
    ...assistantMessage(question.id),
    state: "complete",
    content: "I count. There are 3.",
    toolEvents: [
      { type: "call", call_index: 0, code: "'```'.count('`')", offset: 8 },
      { type: "result", call_index: 0, status: "ok", output: "3", duration_seconds: 0.1 },
    ],
  };
  return new Conversation({ header: newHeader("id", "Counting", Date.UTC(2026, 0, 2)), messages: [question, answer] });
}

test("Markdown reads like the conversation, and code cannot break out of its fence", () => {
  expect(toMarkdown(conversation())).toBe(
    [
      "# Counting",
      "## You",
      "How many?",
      "## nanochat",
      "I count.",
      "````python\n'```'.count('`')\n````",
      "```text\n3\n```",
      "There are 3.\n",
    ].join("\n\n"),
  );
});

test("Markdown carries the pictures of a call", () => {
  const drawn = conversation();
  const answer = drawn.messages.value[1]!;
  const [call, result] = (answer.value as AssistantMessage).toolEvents;
  const pictures = [{ name: "figure-1.png", media_type: "image/png", data: "cGl4" }];
  answer.value = { ...answer.value, toolEvents: [call!, { ...result!, pictures } as ToolEvent] } as AssistantMessage;
  expect(toMarkdown(drawn)).toContain("```text\n3\n```\n\n![](data:image/png;base64,cGl4)\n\nThere are 3.");
});

test("JSON holds messages that the API accepts as they are", () => {
  const exported = JSON.parse(toJson(conversation())) as { title: string; created: string; messages: unknown[] };
  expect(exported.title).toBe("Counting");
  expect(exported.created).toBe("2026-01-02T00:00:00.000Z");
  expect(exported.messages[0]).toEqual({ role: "user", content: "How many?" });
  expect(exported.messages[1]).toMatchObject({ role: "assistant", nanochat: { tool_events: [{ type: "call" }, {}] } });
});

test("file names suit any file system", () => {
  expect(fileName("What is 1/2? Größe…", "md")).toBe("what-is-1-2-größe.md");
  expect(fileName("???", "json")).toBe("conversation.json");
});
