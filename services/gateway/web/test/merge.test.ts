import fc from "fast-check";
import { expect, test } from "vitest";
import { changed, compareProgress, mergeHeaders, mergeMessages, sameHeader, type Header } from "../src/chat/merge";
import type { AssistantMessage, Message } from "../src/chat/message";

const id = fc.constantFrom("a", "b", "c");
const time = fc.integer({ min: 0, max: 5 });
const text = fc.constantFrom("", "x", "xy", "xyz");
const register = <T>(value: fc.Arbitrary<T>) => fc.record({ value, at: time });

const headers: fc.Arbitrary<Header> = fc.record({
  version: fc.constant(2 as const),
  id: fc.constant("conversation"),
  createdAt: time,
  updatedAt: time,
  title: register(text),
  deleted: register(fc.boolean()),
  chosen: fc.dictionary(id, register(id)),
});

const event = fc.constant({ type: "call" as const, call_index: 0, code: "1", offset: 0 });
const answers: fc.Arbitrary<Message> = fc.record(
  {
    id: fc.constant("answer"),
    parent: fc.constant("question"),
    createdAt: fc.constant(1),
    role: fc.constant("assistant" as const),
    content: text,
    toolEvents: fc.array(event, { maxLength: 2 }),
    state: fc.constantFrom("streaming" as const, "interrupted" as const, "stopped" as const, "complete" as const),
    finishReason: fc.constantFrom("stop", "length"),
  },
  { requiredKeys: ["id", "parent", "createdAt", "role", "content", "toolEvents", "state"] },
);

test("headers agree in whatever order and however often the tabs hear of each other", () => {
  fc.assert(
    fc.property(headers, headers, headers, (a, b, c) => {
      expect(mergeHeaders(a, a)).toBe(a);
      expect(sameHeader(mergeHeaders(a, b), mergeHeaders(b, a))).toBe(true);
      expect(sameHeader(mergeHeaders(mergeHeaders(a, b), c), mergeHeaders(a, mergeHeaders(b, c)))).toBe(true);
      const merged = mergeHeaders(a, b);
      expect(mergeHeaders(merged, a)).toBe(merged); // `a` adds nothing to a merge that contains it
    }),
  );
});

test("copies of an answer agree in whatever order they are merged", () => {
  fc.assert(
    fc.property(answers, answers, answers, (a, b, c) => {
      expect(mergeMessages(a, a)).toBe(a);
      expect(mergeMessages(a, b)).toEqual(mergeMessages(b, a));
      expect(mergeMessages(mergeMessages(a, b), c)).toEqual(mergeMessages(a, mergeMessages(b, c)));
    }),
  );
});

test("a merge never takes an answer back", () => {
  const order = ["streaming", "interrupted", "stopped", "complete"];
  fc.assert(
    fc.property(answers, answers, (a, b) => {
      const merged = mergeMessages(a, b) as AssistantMessage;
      for (const copy of [a, b] as AssistantMessage[]) {
        expect(order.indexOf(merged.state)).toBeGreaterThanOrEqual(order.indexOf(copy.state));
        if (copy.state === merged.state) expect(merged.content.length).toBeGreaterThanOrEqual(copy.content.length);
      }
    }),
  );
});

test("the order of the fields makes no difference, so that tabs do not correct each other for ever", () => {
  fc.assert(
    fc.property(answers, (answer) => {
      const reordered = Object.fromEntries(Object.entries(answer).reverse()) as unknown as Message;
      expect(compareProgress(answer, reordered)).toBe(0);
    }),
  );
});

test("a change is later than the one before it, even if the clock went back", () => {
  const future = Date.now() + 1e9;
  expect(changed({ value: "a", at: future }, "b")).toEqual({ value: "b", at: future + 1 });
});
