import fc from "fast-check";
import { expect, test } from "vitest";
import { fromArchive, toArchive } from "../src/chat/archive";
import { Conversation } from "../src/chat/conversation";
import { toJson } from "../src/chat/export";
import { newHeader, type StoredConversation } from "../src/chat/merge";
import { assistantMessage, userMessage } from "../src/chat/message";
import { DEFAULTS } from "../src/storage/settings";

const question = userMessage("Hi 😀");
const versions = ["One", "Two"].map((content) => ({
  ...assistantMessage(question.id),
  state: "complete" as const,
  content,
}));
const CONVERSATION: StoredConversation = {
  header: { ...newHeader("c1", "Title", 1), chosen: { [question.id]: { value: versions[0]!.id, at: 3 } } },
  messages: [question, ...versions],
};

test("everything comes back: conversations with all versions, and settings, but not the key", () => {
  const text = toArchive([CONVERSATION], { ...DEFAULTS, systemPrompt: "Be brief.", apiKey: "secret" });
  expect(text).not.toContain("secret");
  const { conversations, settings } = fromArchive(text);
  expect(conversations).toEqual([CONVERSATION]);
  expect(settings).toMatchObject({ systemPrompt: "Be brief." });
});

test("the export of a single conversation can be read too", () => {
  const [single] = fromArchive(toJson(new Conversation(CONVERSATION))).conversations;
  expect(single!.header.title.value).toBe("Title");
  expect(new Conversation(single!).snapshot()).toMatchObject([
    { role: "user", content: "Hi 😀" },
    { role: "assistant", content: "One", state: "complete" },
  ]);
});

test.each(["", "null", "7", "{}", "[]", '{"messages": []}', '{"format": "nanochat-archive", "conversations": [{}]}'])(
  "%j is refused",
  (text) => {
    expect(() => fromArchive(text)).toThrow();
  },
);

test("no JSON makes the import do anything but refuse or read", () => {
  fc.assert(
    fc.property(fc.json(), (text) => {
      try {
        fromArchive(text);
      } catch (error) {
        expect(error).toBeInstanceOf(Error);
      }
    }),
  );
});
