// @vitest-environment jsdom
import { signal } from "@preact/signals";
import { render } from "preact";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import type { Api } from "../src/api/api";
import type { ChatPart } from "../src/api/wire";
import { ChatApp } from "../src/chat/chat-app";
import { App } from "../src/components/App";
import { PageContext } from "../src/components/context";
import { Lessons } from "../src/lessons/watch";
import { Layout } from "../src/page/layout";
import { ConversationStore } from "../src/storage/conversation-store";
import { Drafts } from "../src/storage/drafts";
import { DEFAULTS } from "../src/storage/settings";
import { TrainingWatch } from "../src/training/watch";

let app: ChatApp;
let answers: ChatPart[][];

beforeEach(() => {
  // Parts of a browser that jsdom lacks.
  vi.stubGlobal("matchMedia", () => ({ matches: false, addEventListener: () => undefined }));
  vi.stubGlobal(
    "ResizeObserver",
    class {
      observe(): void {}
      disconnect(): void {}
    },
  );
  Element.prototype.scrollTo = () => undefined;
  HTMLDialogElement.prototype.showModal = function () {
    this.open = true;
  };
  HTMLDialogElement.prototype.close = function () {
    this.open = false;
  };
  localStorage.clear();
  sessionStorage.clear();
  answers = [];
  const api = {
    readiness: () => Promise.resolve({ status: 200, waitsFor: null }),
    models: () => Promise.resolve([{ id: "demo" }]),
    async *chat() {
      yield* answers.shift()!;
    },
  };
  app = new ChatApp(api as unknown as Api, new ConversationStore(localStorage), signal({ ...DEFAULTS }));
  app.start();
  document.body.replaceChildren(document.createElement("div"));
  const page = {
    app,
    theme: signal("system" as const),
    layout: new Layout(),
    drafts: new Drafts(sessionStorage),
    training: new TrainingWatch(document.baseURI),
    lessons: new Lessons(api as unknown as Api, { hasKey: () => false, onServed: () => undefined }),
  };
  render(
    <PageContext.Provider value={page}>
      <App />
    </PageContext.Provider>,
    document.body.firstElementChild!,
  );
});

afterEach(() => {
  render(null, document.body.firstElementChild!);
  app.health.stop();
  vi.unstubAllGlobals();
});

const find = (id: string) => document.querySelector<HTMLElement>(`[data-testid=${id}]`)!;
const all = (id: string) => [...document.querySelectorAll<HTMLElement>(`[data-testid=${id}]`)];

async function drawn(): Promise<void> {
  for (let i = 0; i < 5; i += 1) await new Promise((resolve) => setTimeout(resolve, 5));
}

async function ask(text: string, ...parts: ChatPart[]): Promise<void> {
  answers.push([...parts, { kind: "finish", reason: "stop" }]);
  const composer = find("composer") as HTMLTextAreaElement;
  composer.value = text;
  composer.dispatchEvent(new InputEvent("input", { bubbles: true }));
  await drawn();
  composer.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true }));
  await drawn();
}

test("a question and its answer are shown, with the mark where the model's memory begins", async () => {
  await ask("One", { kind: "text", text: "First *answer*." });
  await ask("Two", { kind: "left-out", turns: 2 }, { kind: "text", text: "Second." });
  expect(all("message-user").map((message) => message.querySelector(".bubble")!.textContent)).toEqual(["One", "Two"]);
  expect(all("message-assistant").map((message) => message.dataset.state)).toEqual(["complete", "complete"]);
  expect(document.querySelector(".prose em")!.textContent).toBe("answer");
  expect(find("memory-mark").nextElementSibling).toBe(all("message-user")[1]);
});

test("another version replaces the words, and the focus stays on the arrows", async () => {
  await ask("One", { kind: "text", text: "First." });
  answers.push([{ kind: "text", text: "Second." }]);
  find("regenerate").click();
  await drawn();
  expect(find("message-assistant").textContent).toContain("Second.");
  const back = document.querySelector<HTMLElement>("[aria-label='Earlier version']")!;
  back.focus();
  back.click();
  await drawn();
  expect(find("message-assistant").textContent).toContain("First.");
  expect(document.activeElement).toBe(back);
});

test("an edited question closes its field, and its old version is one arrow away", async () => {
  await ask("One", { kind: "text", text: "First." });
  find("edit").click();
  await drawn();
  answers.push([{ kind: "text", text: "Second." }]);
  const field = find("edit-text") as HTMLTextAreaElement;
  field.value = "Uno";
  field.dispatchEvent(new InputEvent("input", { bubbles: true }));
  await drawn();
  find("edit-send").click();
  await drawn();
  expect(find("edit-text")).toBeNull();
  expect(find("message-user").textContent).toContain("Uno");
  expect(find("versions").textContent).toBe("2/2");
});

test("a long message is shown from its beginning until one asks for all of it", async () => {
  await ask(`start ${"x".repeat(6_000)} end`, { kind: "text", text: "Ok." });
  expect(find("message-user").textContent).not.toContain("end");
  find("show-whole").click();
  await drawn();
  expect(find("message-user").textContent).toContain("end");
});

test("a question mark opens the keyboard map", async () => {
  await drawn();
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "?", bubbles: true }));
  await drawn();
  expect((find("keyboard") as HTMLDialogElement).open).toBe(true);
  expect(find("keyboard").textContent).toContain("New chat");
});

/** Runs `look` as soon as the element is in the document, before the browser could paint it or deliver a key. */
async function onceShown(selector: string, look: (element: HTMLElement) => void): Promise<void> {
  await new Promise<void>((resolve) => {
    const observer = new MutationObserver(() => {
      const element = document.querySelector<HTMLElement>(selector);
      if (!element) return;
      observer.disconnect();
      look(element);
      resolve();
    });
    observer.observe(document.body, { childList: true, subtree: true });
  });
}

test("a window is open as soon as its text is there, so that Escape never acts on the page behind it", async () => {
  await drawn();
  const shown = onceShown("[data-testid=keyboard] .shortcuts", () => {
    expect((find("keyboard") as HTMLDialogElement).open).toBe(true);
  });
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "?", bubbles: true }));
  await shown;
});

test("a field that replaces a text has the focus as soon as it is there", async () => {
  await ask("One", { kind: "text", text: "First." });
  const shown = onceShown("[data-testid=edit-text]", (field) => expect(document.activeElement).toBe(field));
  find("edit").click();
  await shown;
});

test("a pasted text that no model can read is kept out and named", async () => {
  const paste = new Event("paste", { bubbles: true, cancelable: true });
  Object.assign(paste, { clipboardData: { getData: () => "x".repeat(3_000_000) } });
  find("composer").dispatchEvent(paste);
  await drawn();
  expect(paste.defaultPrevented).toBe(true);
  expect(document.querySelector(".toast")!.textContent).toContain("3,000,000 characters");
});

test("a turn of the wheel lets go of the end, before the browser has scrolled", async () => {
  const view = document.querySelector(".thread")!;
  const sizes = { scrollHeight: 1_000, clientHeight: 400, scrollTop: 600 };
  for (const [name, value] of Object.entries(sizes)) Object.defineProperty(view, name, { value, writable: true });
  const scrollTo = (top: number) => {
    view.scrollTop = top;
    view.dispatchEvent(new Event("scroll"));
  };
  const toEnd = () => document.querySelector("[aria-label='Go to the latest message']");
  await vi.waitFor(() => {
    [600, 500].forEach(scrollTo);
    expect(toEnd()).not.toBeNull();
  });
  scrollTo(600);
  await vi.waitFor(() => expect(toEnd()).toBeNull());
  const inside = view.querySelector(".column")!;
  const turn = (init: WheelEventInit) => inside.dispatchEvent(new WheelEvent("wheel", { bubbles: true, ...init }));
  inside.scrollTop = 50; // an element that scrolls itself
  turn({ deltaY: -3 });
  inside.scrollTop = 0;
  turn({ deltaY: 3 });
  turn({ deltaY: -3, ctrlKey: true }); // zooms
  expect(view.scrollTop).toBe(600);
  turn({ deltaY: -3 });
  expect(view.scrollTop).toBeLessThan(600);
  await vi.waitFor(() => expect(toEnd()).not.toBeNull());
});
