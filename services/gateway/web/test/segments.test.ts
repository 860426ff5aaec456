import { expect, test } from "vitest";
import type { ToolEvent } from "../src/api/wire";
import { finishedEvents, segments } from "../src/chat/segments";

const call = (call_index: number, offset: number): ToolEvent => ({
  type: "call",
  call_index,
  code: `${call_index}`,
  offset,
});
const result = (call_index: number): ToolEvent => ({
  type: "result",
  call_index,
  status: "ok",
  output: "",
  duration_seconds: 0,
});

/** Lists the segments: a text unchanged, a call as "[index]", and a call with a result as "[index!]". */
function outline(content: string, events: ToolEvent[]): string[] {
  return segments(content, events).map((segment) =>
    segment.kind === "text" ? segment.text : `[${segment.call.call_index}${segment.result ? "!" : ""}]`,
  );
}

test("calls stand where the model made them, with their results", () => {
  const events = [call(0, 3), result(0), call(1, 6)];
  expect(outline("abcdefghi", events)).toEqual(["abc", "[0!]", "def", "[1]", "ghi"]);
});

test("offsets count code points, so that emoji before a call do not shift it", () => {
  expect(outline("😀é𝒳 after", [call(0, 3)])).toEqual(["😀é𝒳", "[0]", " after"]);
});

test("calls at one place keep their order, and blank text between them is not shown", () => {
  expect(outline("a \n", [call(1, 3), call(0, 1)])).toEqual(["a", "[0]", "[1]"]);
});

test("an offset beyond the text that has arrived puts the call at its end", () => {
  expect(outline("abc", [call(0, 99)])).toEqual(["abc", "[0]"]);
});

test("a call keeps its key while text and calls are added", () => {
  const before = segments("ab", [call(0, 1)]);
  const after = segments("abcd", [call(0, 1), result(0), call(1, 3)]);
  expect(after.slice(0, 3).map((segment) => segment.key)).toEqual(before.map((segment) => segment.key));
});

test("unfinished calls are left out of what is sent back", () => {
  expect(finishedEvents([call(0, 0), result(0), call(1, 2)])).toEqual([call(0, 0), result(0)]);
});
