// @vitest-environment jsdom
import fc from "fast-check";
import { beforeEach, expect, test, vi } from "vitest";
import type { Conversation } from "../src/chat/conversation";
import { Library } from "../src/chat/library";
import { changed, mergeHeaders, newHeader, type Header, type StoredConversation } from "../src/chat/merge";
import { assistantMessage, userMessage, type Message } from "../src/chat/message";
import { ConversationStore } from "../src/storage/conversation-store";
import { DEFAULTS, storedSettings } from "../src/storage/settings";
import { NO_LINKS } from "../src/storage/tabs";
import { TestBrowser } from "./browser";

beforeEach(() => localStorage.clear());

function headerKeys(storage: Storage): string[] {
  return Object.keys(storage).filter((key) => key.startsWith("nanochat.conversation."));
}

function conversation(text = "Hello"): StoredConversation {
  return { header: newHeader("c1", text, 1), messages: [userMessage(text)] };
}

test("what is saved is loaded again", () => {
  const saved = conversation();
  new ConversationStore(localStorage).save(saved);
  expect(new ConversationStore(localStorage).load()).toEqual([saved]);
});

test("each message has its own entry, so that saving one overwrites no other", () => {
  const store = new ConversationStore(localStorage);
  const saved = conversation();
  store.save(saved);
  const answer: Message = { ...assistantMessage(saved.messages[0]!.id), content: "Hi", state: "complete" };
  store.saveMessages("c1", [answer]);
  expect(store.load()[0]!.messages).toHaveLength(2);
});

const FIRST_FORMAT = {
  version: 1,
  id: "old",
  title: "Old",
  createdAt: 5,
  updatedAt: 9,
  messages: [
    { id: "m1", role: "user", content: "Hi" },
    { id: "m2", role: "assistant", content: "Hel", toolEvents: [], state: "streaming" },
  ],
};

test("conversations of the first format are read, and converted when they change", () => {
  localStorage.setItem("nanochat.conversation.old", JSON.stringify(FIRST_FORMAT));
  const store = new ConversationStore(localStorage);
  const [old] = store.load();
  expect(old).toMatchObject({
    header: { id: "old", title: { value: "Old" }, updatedAt: 9 },
    messages: [
      { id: "m1", parent: null },
      { id: "m2", parent: "m1", content: "Hel", state: "interrupted" },
    ],
  });
  store.saveHeader({ ...old!.header, title: { value: "New", at: 10 } });
  expect(store.load()).toEqual([{ ...old, header: { ...old!.header, title: { value: "New", at: 10 } } }]);
});

test("where there is no room to convert it, a conversation stays in the first format", () => {
  const content = "x".repeat(3_000_000);
  const large = { ...FIRST_FORMAT, messages: [{ id: "m1", role: "user", content }] };
  localStorage.setItem("nanochat.conversation.old", JSON.stringify(large));
  const store = new ConversationStore(localStorage);
  store.saveHeader(store.load()[0]!.header);
  expect(store.refusal.value).toBe("full");
  expect(store.load()[0]!.messages[0]!.content).toBe(content);
});

test.each(['{"version":1', "null", '{"version":2}', '{"version":1,"id":"x","title":"t","messages":[7]}'])(
  "a damaged entry (%s) hides no other, and stays until it is discarded",
  (text) => {
    const store = new ConversationStore(localStorage);
    store.save(conversation());
    localStorage.setItem("nanochat.conversation.bad", text);
    expect(store.load()).toHaveLength(1);
    expect(store.damagedText()).toBe(text);
    store.discardDamaged();
    expect(localStorage.getItem("nanochat.conversation.bad")).toBeNull();
    expect(store.damaged.value).toEqual([]);
  },
);

test("messages whose header is lost are found again", () => {
  const store = new ConversationStore(localStorage);
  store.save(conversation());
  const [key] = headerKeys(localStorage);
  localStorage.setItem(key!, "{");
  expect(store.load()[0]).toMatchObject({ header: { title: { value: "Hello" } }, messages: [{ content: "Hello" }] });
});

test("a deleted conversation loses its messages, and its name after a month", () => {
  const store = new ConversationStore(localStorage);
  const deleted = conversation();
  const header: Header = { ...deleted.header, deleted: { value: true, at: Date.now() } };
  store.save({ ...deleted, header });
  expect(store.load()).toEqual([{ header, messages: deleted.messages }]); // kept, because the deletion may be undone
  vi.useFakeTimers({ now: Date.now() + 2 * 3_600_000 });
  expect(store.load()).toEqual([{ header, messages: [] }]);
  expect(Object.keys(localStorage)).toEqual([expect.stringMatching(/^nanochat\.conversation\.c1\.[0-9a-f]{16}$/)]);
  vi.setSystemTime(Date.now() + 31 * 86_400_000);
  expect(store.load()).toEqual([]);
  expect(Object.keys(localStorage)).toEqual([]);
  vi.useRealTimers();
});

test("where there is no room for pictures, a message is kept without them", () => {
  const store = new ConversationStore(localStorage);
  const pictures = [{ name: "figure-1.png", media_type: "image/png", data: "x".repeat(6_000_000) }];
  const result = { type: "result", call_index: 0, status: "ok", output: "3", duration_seconds: 0.1 } as const;
  const answer: Message = { ...assistantMessage(), state: "complete", toolEvents: [{ ...result, pictures }] };
  store.saveMessages("c1", [answer]);
  expect(store.refusal.value).toBeNull();
  expect(store.load()[0]!.messages[0]).toMatchObject({ toolEvents: [result] });
  expect(localStorage.getItem(`nanochat.message.c1.${answer.id}`)).not.toContain("pictures");
});

test("a full storage is reported, keeps what it has, and recovers once there is room", () => {
  const store = new ConversationStore(localStorage);
  const kept = conversation("kept");
  store.save(kept);
  store.saveMessages("c1", [userMessage("x".repeat(6_000_000))]);
  expect(store.refusal.value).toBe("full");
  expect(store.load()).toEqual([kept]);
  store.save(kept);
  expect(store.refusal.value).toBeNull();
});

test("a full storage still stores that a conversation was deleted, and keeps no other entry of its header", () => {
  const store = new ConversationStore(localStorage);
  const full = conversation();
  store.save(full);
  localStorage.setItem("spare", "x".repeat(50)); // room for the time of the deletion, but not for another header
  for (let size = 1 << 22; size >= 1; size >>= 1) {
    try {
      localStorage.setItem(`other${size}`, "x".repeat(size));
    } catch {
      // The next entry is smaller. In the end, no entry has room.
    }
  }
  localStorage.removeItem("spare");
  store.saveHeader({ ...full.header, deleted: { value: true, at: Date.now() } });
  expect(store.refusal.value).toBeNull();
  expect(store.load()[0]!.header.deleted.value).toBe(true);
  expect(headerKeys(localStorage)).toHaveLength(1);
});

const changes = fc.array(
  fc.record({
    tab: fc.constantFrom(0, 1),
    step: fc.constantFrom("change", "change", "deliver", "reload"),
    value: fc.constantFrom("a", "b"),
    at: fc.integer({ min: 1, max: 2 }),
  }),
  { maxLength: 30 },
);

/** Two tabs make the same change, hear of each other, and store the header again. */
const SAME_CHANGE = (["change", "deliver", "change"] as const).flatMap((step) =>
  ([0, 1] as const).map((tab) => ({ tab, step, value: "a" as const, at: 1 })),
);

test("tabs that change a header at the same time lose no change, and leave one entry of it", () => {
  fc.assert(
    fc.property(changes, (script) => {
      const browser = new TestBrowser();
      const open = () => {
        const tab = browser.open();
        const store = new ConversationStore(tab.storage);
        store.watch(tab.window as Window, { header: () => undefined, message: () => undefined });
        return { tab, store };
      };
      const tabs = [open(), open()];
      let all = newHeader("c1", "", 0);
      for (const { tab, step, value, at } of script) {
        if (step === "change") {
          const header: Header = { ...newHeader("c1", "", 0), chosen: { [value]: { value, at } } };
          tabs[tab]!.store.saveHeader(header);
          all = mergeHeaders(all, header);
        } else if (step === "deliver") {
          tabs[tab]!.tab.deliver(at);
        } else {
          browser.close(tabs[tab]!.tab);
          tabs[tab] = open();
        }
        const [stored] = new ConversationStore(browser.open().storage).load();
        expect(stored?.header.chosen ?? {}).toEqual(all.chosen);
      }
      browser.deliverAll();
      const { tab, store } = tabs[0]!;
      store.saveHeader(all);
      expect(headerKeys(tab.storage)).toHaveLength(1);
    }),
    { numRuns: 500, examples: [[SAME_CHANGE]] },
  );
});

test("tabs that share a storage lose no change before they hear of each other", () => {
  const tabs = [0, 1].map(() => {
    const [store, events] = [new ConversationStore(localStorage), new EventTarget()];
    store.watch(events as Window, { header: () => undefined, message: () => undefined });
    return { store, events };
  });
  let all = newHeader("c1", "", 0);
  const keys = new Set<string>();
  for (const [place, tab] of [
    ["a", 0],
    ["b", 1],
    ["c", 1],
    ["d", 0],
    ["e", 1],
  ] as const) {
    const header: Header = { ...newHeader("c1", "", 0), chosen: { [place]: { value: place, at: 1 } } };
    tabs[tab]!.store.saveHeader(header);
    all = mergeHeaders(all, header);
    headerKeys(localStorage).forEach((key) => keys.add(key));
    expect(new ConversationStore(localStorage).load()[0]!.header.chosen).toEqual(all.chosen);
  }
  expect(headerKeys(localStorage)).toHaveLength(2);
  for (const { store, events } of tabs) {
    for (const key of keys) {
      const newValue = localStorage.getItem(key);
      events.dispatchEvent(Object.assign(new Event("storage"), { storageArea: localStorage, key, newValue }));
    }
    store.saveHeader(newHeader("c1", "", 0));
    headerKeys(localStorage).forEach((key) => keys.add(key));
    expect(headerKeys(localStorage)).toHaveLength(1);
    expect(new ConversationStore(localStorage).load()[0]!.header.chosen).toEqual(all.chosen);
  }
});

/** Counts how often the keys of the whole storage are listed while `work` runs. */
function listings(work: () => void): number {
  const keys = vi.spyOn(Object, "keys");
  work();
  const count = keys.mock.calls.filter(([object]) => object === localStorage).length;
  keys.mockRestore();
  return count;
}

test("how often the storage's keys are listed does not depend on the number of changes", () => {
  const ids = Array.from({ length: 30 }, (_, index) => `c${index}`);
  const library = new Library(new ConversationStore(localStorage), NO_LINKS);
  library.load();
  const stored = ids.map((id) => ({ header: newHeader(id, id, 1), messages: [userMessage(id)] }));
  expect(listings(() => library.merge(stored))).toBe(0);
  const conversations = library.conversations.peek();
  const rename = (conversation: Conversation) => {
    conversation.change(({ title }) => ({ title: changed(title, "Other") }));
    library.saveHeader(conversation);
  };
  expect(listings(() => conversations.forEach(rename))).toBe(0);
  expect(listings(() => library.remove(conversations))).toBe(0);
  expect(listings(() => library.close())).toBe(1);
  expect(headerKeys(localStorage)).toHaveLength(30);
  expect(Object.keys(localStorage)).toHaveLength(30);
});

test("a full storage is searched once for deleted conversations, and again only after another deletion", () => {
  const store = new ConversationStore(localStorage);
  const old = { header: newHeader("old", "Old", 1), messages: [userMessage("x".repeat(3_000_000))] };
  store.save(old);
  for (let id = 0; id < 20; id += 1) store.saveHeader(newHeader(`c${id}`, "", 1));
  const large = userMessage("y".repeat(3_000_000));
  const read = vi.spyOn(Storage.prototype, "getItem");
  const reads = () => read.mock.calls.splice(0).length;
  expect(store.saveMessages("c0", [large])).toBe(false);
  expect(reads()).toBeGreaterThanOrEqual(20);
  expect(store.saveMessages("c1", [large])).toBe(false);
  expect(reads()).toBe(0);
  store.saveHeader({ ...old.header, deleted: { value: true, at: Date.now() } });
  expect(store.saveMessages("c2", [large])).toBe(true);
  read.mockRestore();
});

test("a full storage makes room from what another tab deleted", () => {
  const store = new ConversationStore(localStorage);
  store.watch(window, { header: () => undefined, message: () => undefined });
  const old = { header: newHeader("old", "Old", 1), messages: [userMessage("x".repeat(3_000_000))] };
  store.save(old);
  const large = userMessage("y".repeat(3_000_000));
  expect(store.saveMessages("c1", [large])).toBe(false);
  const [key] = headerKeys(localStorage);
  const newValue = JSON.stringify({ ...old.header, deleted: { value: true, at: Date.now() } });
  localStorage.setItem(key!, newValue);
  window.dispatchEvent(new StorageEvent("storage", { key: key!, newValue, storageArea: localStorage }));
  expect(store.saveMessages("c1", [large])).toBe(true);
});

test.each(["after the person cleared the storage", "after the browser had frozen the page"])(
  "the entries of a header are looked for again %s",
  (when) => {
    const store = new ConversationStore(localStorage);
    store.watch(window, { header: () => undefined, message: () => undefined });
    const { header } = conversation();
    store.saveHeader(header);
    localStorage.clear();
    if (when.includes("cleared"))
      window.dispatchEvent(new StorageEvent("storage", { key: null, storageArea: localStorage }));
    else window.dispatchEvent(new Event("pageshow"));
    const missed = { ...header, title: { value: "Missed", at: 5 } };
    localStorage.setItem("nanochat.conversation.c1.0", JSON.stringify(missed));
    expect(store.saveHeader(header)).toEqual(missed);
    expect(headerKeys(localStorage)).toHaveLength(1);
  },
);

test("a full storage makes room from what was deleted", () => {
  const store = new ConversationStore(localStorage);
  const old = { header: newHeader("old", "Old", 1), messages: [userMessage("x".repeat(3_000_000))] };
  store.save(old);
  store.saveHeader({ ...old.header, deleted: { value: true, at: Date.now() } });
  store.save({ ...conversation(), messages: [userMessage("y".repeat(3_000_000))] });
  expect(store.refusal.value).toBeNull();
  expect(
    store
      .load()
      .map(({ messages }) => messages.length)
      .sort(),
  ).toEqual([0, 1]);
});

test("a browser that keeps nothing is reported, and the page works without", () => {
  const store = new ConversationStore(null);
  store.save(conversation());
  store.removeMessages(new Set(["x"]));
  expect(store.load()).toEqual([]);
  expect(store.refusal.value).toBe("blocked");
});

test("changes of other tabs are passed on, and only those to conversations", () => {
  const store = new ConversationStore(localStorage);
  const changes: [string, unknown][] = [];
  store.watch(window, {
    header: (header) => changes.push([header.id, header]),
    message: (id, message) => changes.push([id, message]),
  });
  const { header, messages } = conversation();
  const change = (key: string, newValue: string | null) =>
    window.dispatchEvent(new StorageEvent("storage", { key, newValue, storageArea: localStorage }));
  change("nanochat.conversation.c1", JSON.stringify(header));
  change(`nanochat.message.c1.${messages[0]!.id}`, JSON.stringify(messages[0]));
  change("nanochat.conversation.c1", null);
  change("nanochat.settings", "{}");
  change("nanochat.conversation.bad", "{");
  expect(changes).toEqual([
    ["c1", header],
    ["c1", messages[0]],
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
