import type { ToolCall, ToolEvent, ToolResult } from "../api/wire";

/** A part of an answer: text, or a call of the Python tool with its result if the result has arrived. */
export type Segment =
  | { kind: "text"; key: string; text: string }
  | { kind: "call"; key: string; call: ToolCall; result: ToolResult | undefined };

/** Cuts an answer's text at the offsets of its tool calls and puts the calls in between. */
export function segments(content: string, events: readonly ToolEvent[]): Segment[] {
  const calls = events.filter((event) => event.type === "call");
  calls.sort((a, b) => a.offset - b.offset || a.call_index - b.call_index);
  const result: Segment[] = [];
  let start = 0;
  let codePoints = 0;
  for (const call of calls) {
    let end = start;
    while (codePoints < call.offset && end < content.length) {
      end += content.codePointAt(end)! > 0xffff ? 2 : 1;
      codePoints += 1;
    }
    pushText(result, content.slice(start, end));
    result.push({ kind: "call", key: `call-${call.call_index}`, call, result: resultOf(call, events) });
    start = end;
  }
  pushText(result, content.slice(start));
  return result;
}

function pushText(result: Segment[], text: string): void {
  if (text.trim() !== "") result.push({ kind: "text", key: `text-${result.length}`, text });
}

function resultOf(call: ToolCall, events: readonly ToolEvent[]): ToolResult | undefined {
  return events.find((event) => event.type === "result" && event.call_index === call.call_index) as
    ToolResult | undefined;
}

/** Removes calls without a result, which an answer has if it was stopped while Python ran. */
export function finishedEvents(events: readonly ToolEvent[]): ToolEvent[] {
  return events.filter(
    (event) =>
      event.type === "result" ||
      events.some((other) => other.type === "result" && other.call_index === event.call_index),
  );
}
