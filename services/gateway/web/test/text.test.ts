import { expect, test } from "vitest";
import { titleOf } from "../src/chat/title";
import { conversationIdOf, routeOf } from "../src/page/route";
import { duration, period, rate } from "../src/text/format";

test.each([
  ["What is 1234 * 5678?", "What is 1234 * 5678?"],
  ["\n\n## Plan\nmore", "Plan"],
  ["- `code` first", "code first"],
  ["```python\nprint(1)\n```", "print(1)"],
  ["   \n", "New chat"],
  ["word ".repeat(20), "word word word word word word word word word…"],
  ["😀".repeat(60), `${"😀".repeat(48)}…`],
])("the title of %j is %j", (message, title) => {
  expect(titleOf(message)).toBe(title);
});

test.each([
  [0.0002, "1 ms"],
  [0.0421, "42 ms"],
  [0.9999, "1.0 s"],
  [59.96, "1 min 0 s"],
  [185, "3 min 5 s"],
])("%d seconds read %s", (seconds, text) => {
  expect(duration(seconds)).toBe(text);
});

test("rates are as exact as they are small", () => {
  expect([rate(3.14159), rate(41.7), rate(12345)]).toEqual(["3.1", "42", "12,345"]);
});

test("conversations are grouped by calendar days, not by hours", () => {
  const now = new Date(2026, 2, 10, 0, 30);
  const at = (day: number, hour: number) => period(new Date(2026, 2, day, hour).getTime(), now);
  expect([at(10, 0), at(9, 23), at(9, 0), at(8, 23), at(3, 0), at(2, 23)]).toEqual([
    "Today",
    "Yesterday",
    "Yesterday",
    "Last 7 days",
    "Last 7 days",
    "Earlier",
  ]);
});

test("an address names a conversation or a new chat, and nothing else is taken for one", () => {
  expect(conversationIdOf(routeOf("ab12"))).toBe("ab12");
  expect(conversationIdOf(routeOf(null))).toBeNull();
  expect(conversationIdOf("#/c/../x")).toBeNull();
});
