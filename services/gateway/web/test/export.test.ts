import { signal } from "@preact/signals";
import { expect, test } from "vitest";
import { assistantMessage, Conversation, userMessage, type Message } from "../src/chat/conversation";
import { fileName, toJson, toMarkdown } from "../src/chat/export";

function conversation(): Conversation {
  const result = new Conversation("id", Date.UTC(2026, 0, 2), { title: "Counting", updatedAt: 0, messages: [] });
  const answer: Message = {
    ...assistantMessage(),
    state: "complete",
    content: "I count. There are 3.",
    toolEvents: [
      { type: "call", call_index: 0, code: "'```'.count('`')", offset: 8 },
      { type: "result", call_index: 0, status: "ok", output: "3", duration_seconds: 0.1 },
    ],
  };
  result.messages.value = [signal<Message>(userMessage("How many?")), signal<Message>(answer)];
  return result;
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
