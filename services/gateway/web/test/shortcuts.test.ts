// @vitest-environment jsdom
import { expect, test } from "vitest";
import { runShortcut } from "../src/page/shortcuts";

/** The action that a key has on an element of this kind. */
function pressed(tag: string, init: KeyboardEventInit): string {
  const target = document.createElement(tag);
  document.body.append(target);
  let action = "";
  const act = (name: string) => () => {
    action = name;
  };
  target.addEventListener("keydown", (event) => {
    const actions = { escape: act("escape"), newChat: act("new chat"), write: act("write"), help: act("help") };
    runShortcut(event, actions);
  });
  target.dispatchEvent(new KeyboardEvent("keydown", init));
  return action;
}

test.each([
  ["div", { key: "?" }, "help"],
  ["div", { key: "/" }, "write"],
  ["div", { key: "Escape" }, "escape"],
  ["textarea", { key: "Escape" }, "escape"],
  ["textarea", { key: "k", ctrlKey: true }, "new chat"],
  ["div", { key: "K", metaKey: true }, "new chat"],
  ["textarea", { key: "?" }, ""],
  ["input", { key: "/" }, ""],
  ["div", { key: "/", ctrlKey: true }, ""],
  ["div", { key: "k" }, ""],
  ["textarea", { key: "Escape", isComposing: true }, ""],
] as const)("in a %s, %j means: %s", (tag, init, action) => {
  expect(pressed(tag, init)).toBe(action);
});
