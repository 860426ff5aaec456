import { expect, test } from "vitest";
import { serverSentEvents } from "../src/api/sse";
import { bodyOf, collect } from "./streams";

async function dataOf(...chunks: (string | Uint8Array)[]): Promise<string[]> {
  return (await collect(serverSentEvents(bodyOf(...chunks)))).map((event) => event.data);
}

test.each(["\n", "\r\n", "\r"])("events survive every cut of the network, with line end %j", async (end) => {
  const text = `: heartbeat${end}data: {"a": "é😀"}${end}${end}:${end}${end}data:second${end}data: line${end}${end}`;
  const bytes = new TextEncoder().encode(text);
  for (let cut = 0; cut <= bytes.length; cut += 1) {
    expect(await dataOf(bytes.slice(0, cut), bytes.slice(cut))).toEqual(['{"a": "é😀"}', "second\nline"]);
  }
  expect(await dataOf(...Array.from(bytes, (byte) => Uint8Array.of(byte)))).toEqual(['{"a": "é😀"}', "second\nline"]);
});

test("an event that the stream ends in the middle of is dropped", async () => {
  expect(await dataOf("data: whole\n\ndata: half\n")).toEqual(["whole"]);
});

test("a byte order mark, unknown fields and events without data are passed over", async () => {
  expect(await dataOf("\ufeffdata: a\n\nretry: 10\nid: 7\n\nevent: ping\n\ndata: b\nnonsense\n\n")).toEqual(["a", "b"]);
});

test("an event's name is its own", async () => {
  const events = await collect(serverSentEvents(bodyOf("event: error\ndata: a\n\ndata: b\n\n")));
  expect(events.map((event) => event.event)).toEqual(["error", "message"]);
});

test("whoever stops reading closes the connection", async () => {
  let cancelled = false;
  const body = new ReadableStream<Uint8Array>({
    pull: (controller) => controller.enqueue(new TextEncoder().encode("data: x\n\n")),
    cancel: () => {
      cancelled = true;
    },
  });
  for await (const _ of serverSentEvents(body)) break;
  expect(cancelled).toBe(true);
});
