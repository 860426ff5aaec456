// @vitest-environment jsdom
import { signal } from "@preact/signals";
import { render } from "preact";
import { expect, test, vi } from "vitest";
import type { ModelInfo } from "../src/api/wire";
import { PageContext, type Page } from "../src/components/context";
import { EmptyState } from "../src/components/EmptyState";

function show(models: ModelInfo[]) {
  const root = document.createElement("div");
  const app = { models: signal(models), model: signal("demo"), send: vi.fn() };
  render(
    <PageContext.Provider value={{ app } as unknown as Page}>
      <EmptyState />
    </PageContext.Provider>,
    root,
  );
  return { app, examples: [...root.querySelectorAll<HTMLElement>("[data-testid=example]")] };
}

test("the page offers what the chosen model says that it can do", () => {
  const { app, examples } = show([
    { id: "other", nanochat: { examples: ["Not this."] } },
    { id: "demo", nanochat: { examples: ["Who keeps the lighthouse?", "<b>1 + 1</b>"] } },
  ]);
  expect(examples.map((example) => example.textContent)).toEqual(["Who keeps the lighthouse?", "<b>1 + 1</b>"]);
  examples[0]!.click();
  expect(app.send).toHaveBeenCalledWith("Who keeps the lighthouse?");
});

test.each([[[]], [[{ id: "demo" }]], [[{ id: "demo", nanochat: { examples: [] } }]]])(
  "a model without examples gets general ones",
  (models: ModelInfo[]) => expect(show(models).examples.length).toBeGreaterThan(1),
);
