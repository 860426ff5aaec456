// @vitest-environment jsdom
import { signal } from "@preact/signals";
import { beforeEach, expect, test, vi } from "vitest";
import {
  assistantMessage,
  Conversation,
  userMessage,
  type Message,
  type StoredConversation,
} from "../src/chat/conversation";
import { ConversationStore } from "../src/storage/conversation-store";
import { DEFAULTS, storedSettings } from "../src/storage/settings";

beforeEach(() => localStorage.clear());

function conversation(text = "Hello"): Conversation {
  const result = Conversation.begin(text);
  result.messages.value = [signal<Message>(userMessage(text))];
  return result;
}

test("what is saved is loaded again", () => {
  const saved = conversation();
  new ConversationStore(localStorage).save(saved);
  expect(new ConversationStore(localStorage).load()).toEqual([saved.toStored()]);
});

test("an answer that was being written comes back as interrupted, with what had arrived", () => {
  const saved = conversation();
  const answer: Message = { ...assistantMessage(), content: "Half an" };
  saved.messages.value = [...saved.messages.value, signal<Message>(answer)];
  const store = new ConversationStore(localStorage);
  store.save(saved);
  expect(store.load()[0]!.messages[1]).toMatchObject({ content: "Half an", state: "interrupted" });
});

test.each([
  '{"version":1',
  "null",
  '{"version":2}',
  '{"version":1,"id":"x","title":"t","createdAt":1,"updatedAt":1,"messages":[7]}',
])("a damaged entry (%s) hides no other, and stays until it is discarded", (text) => {
  const store = new ConversationStore(localStorage);
  store.save(conversation());
  localStorage.setItem("nanochat.conversation.bad", text);
  expect(store.load()).toHaveLength(1);
  expect(store.damagedText()).toBe(text);
  store.discardDamaged();
  expect(localStorage.getItem("nanochat.conversation.bad")).toBeNull();
  expect(store.damaged.value).toEqual([]);
});

test("a full storage is reported, keeps what it has, and recovers once there is room", () => {
  const store = new ConversationStore(localStorage);
  const kept = conversation("kept");
  store.save(kept);
  store.save(conversation("x".repeat(6_000_000)));
  expect(store.refusal.value).toBe("full");
  expect(store.load().map((stored) => stored.title)).toEqual(["kept"]);
  store.save(kept);
  expect(store.refusal.value).toBeNull();
});

test("a browser that keeps nothing is reported, and the page works without", () => {
  const store = new ConversationStore(null);
  store.save(conversation());
  store.remove("x");
  expect(store.load()).toEqual([]);
  expect(store.refusal.value).toBe("blocked");
});

test("changes of other tabs are passed on, and only those to conversations", () => {
  const store = new ConversationStore(localStorage);
  const changes: [string, StoredConversation | null][] = [];
  store.watch(window, (id, stored) => changes.push([id, stored]));
  const stored = conversation().toStored();
  const change = (key: string, newValue: string | null) =>
    window.dispatchEvent(new StorageEvent("storage", { key, newValue, storageArea: localStorage }));
  change(`nanochat.conversation.${stored.id}`, JSON.stringify(stored));
  change("nanochat.conversation.gone", null);
  change("nanochat.settings", "{}");
  change("nanochat.conversation.bad", "{");
  expect(changes).toEqual([
    [stored.id, stored],
    ["gone", null],
  ]);
  expect(store.damaged.value).toEqual(["nanochat.conversation.bad"]);
});

test("settings are kept, and what is unusable in them becomes its default", () => {
  const settings = storedSettings(localStorage);
  settings.value = { ...settings.value, temperature: 0, topK: null, seed: 7, systemPrompt: "Be brief." };
  expect(storedSettings(localStorage).value).toEqual({
    ...DEFAULTS,
    temperature: 0,
    topK: null,
    seed: 7,
    systemPrompt: "Be brief.",
  });
  localStorage.setItem(
    "nanochat.settings",
    '{"temperature": 99, "topP": null, "model": 4, "other": 1, "maxTokens": 5}',
  );
  expect(storedSettings(localStorage).value).toEqual({ ...DEFAULTS, maxTokens: 5 });
  localStorage.setItem("nanochat.settings", "not JSON");
  expect(storedSettings(localStorage).value).toEqual(DEFAULTS);
});

test("settings hold for the visit when the storage is full", () => {
  const refuse = vi.spyOn(Storage.prototype, "setItem").mockImplementation(() => {
    throw new DOMException("full", "QuotaExceededError");
  });
  const settings = storedSettings(localStorage);
  settings.value = { ...settings.value, seed: 3 };
  expect(settings.value.seed).toBe(3);
  refuse.mockRestore();
});
