import { expect, test } from "vitest";
import { chatParts } from "../src/api/chat-stream";
import { ApiError, ConnectionError, ProtocolError } from "../src/api/errors";
import { bodyOf, collect } from "./streams";

const event = (value: unknown) => `data: ${JSON.stringify(value)}\n\n`;
const delta = (content: object, finish_reason: string | null = null) =>
  event({ choices: [{ index: 0, delta: content, finish_reason }] });

test("a stream yields text, tool events, the reason for its end and the usage, in their order", async () => {
  const call = { type: "call", call_index: 0, code: "6 * 7", offset: 5 };
  const parts = await collect(
    chatParts(
      bodyOf(
        delta({ role: "assistant", content: "" }),
        delta({ content: "It is", nanochat: { tool_events: [call] } }),
        delta({}, "stop"),
        event({ choices: [], usage: { prompt_tokens: 3, completion_tokens: 2 } }),
        "data: [DONE]\n\n",
      ),
    ),
  );
  expect(parts).toEqual([
    { kind: "text", text: "It is" },
    { kind: "tool", event: call },
    { kind: "finish", reason: "stop" },
    { kind: "usage", usage: { prompt_tokens: 3, completion_tokens: 2 } },
  ]);
});

test("a stream says how many turns the model does not see", async () => {
  const first = delta({ role: "assistant", content: "", nanochat: { left_out_turns: 2 } });
  expect(await collect(chatParts(bodyOf(first, "data: [DONE]\n\n")))).toEqual([{ kind: "left-out", turns: 2 }]);
});

test("an error event ends the stream with the server's message", async () => {
  const body = bodyOf(
    delta({ content: "Hi" }),
    event({ error: { message: "the engine is gone", code: "engine_lost" } }),
  );
  const error: unknown = await collect(chatParts(body)).catch((reason: unknown) => reason);
  expect(error).toBeInstanceOf(ApiError);
  expect(error).toMatchObject({ message: "the engine is gone", code: "engine_lost", status: undefined });
});

test("a stream that ends without [DONE] is a lost connection, whatever came before", async () => {
  await expect(collect(chatParts(bodyOf(delta({ content: "Hi" }, "stop"))))).rejects.toThrow(ConnectionError);
});

test.each(["<html>", "null", "7"])("an event that holds %s is not the protocol", async (data) => {
  await expect(collect(chatParts(bodyOf(`data: ${data}\n\n`)))).rejects.toThrow(ProtocolError);
});
