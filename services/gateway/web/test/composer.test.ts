// @vitest-environment jsdom
import { afterEach, expect, test, vi } from "vitest";
import { isSendKey } from "../src/page/textarea";
import { Drafts } from "../src/storage/drafts";

afterEach(() => {
  vi.unstubAllGlobals();
  vi.restoreAllMocks();
  sessionStorage.clear();
});

function withKeyboard(touch: boolean): void {
  vi.stubGlobal("matchMedia", () => ({ matches: touch }));
}

const key = (init: KeyboardEventInit) => new KeyboardEvent("keydown", { key: "Enter", ...init });

test.each([
  [{}, true],
  [{ shiftKey: true }, false],
  [{ ctrlKey: true }, true],
  [{ isComposing: true }, false],
  [{ keyCode: 229 }, false], // Safari ends the composition before the key event
  [{ key: "a" }, false],
] as const)("with a keyboard, Enter with %j sends: %s", (init, sends) => {
  withKeyboard(false);
  expect(isSendKey(key(init))).toBe(sends);
});

test.each([
  [{}, false],
  [{ metaKey: true }, true],
  [{ ctrlKey: true, keyCode: 229 }, false],
] as const)("on a touch screen, Enter with %j sends: %s", (init, sends) => {
  withKeyboard(true);
  expect(isSendKey(key(init))).toBe(sends);
});

test("each conversation keeps its draft over a reload", () => {
  const drafts = new Drafts(sessionStorage);
  drafts.set(null, "new");
  drafts.set("c1", "old");
  const reloaded = new Drafts(sessionStorage);
  expect([reloaded.get(null), reloaded.get("c1"), reloaded.get("c2")]).toEqual(["new", "old", ""]);
  reloaded.set("c1", "");
  expect(Object.keys(sessionStorage)).toEqual(["nanochat.draft."]);
});

test("a draft that finds no room lasts until the page is closed", () => {
  for (const storage of [null, sessionStorage]) {
    vi.spyOn(Storage.prototype, "setItem").mockImplementation(() => {
      throw new DOMException("full", "QuotaExceededError");
    });
    const drafts = new Drafts(storage);
    drafts.set("c1", "text");
    expect(drafts.get("c1")).toBe("text");
    drafts.set("c1", "");
    expect(drafts.get("c1")).toBe("");
  }
});
