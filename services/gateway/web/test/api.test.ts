import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { afterEach, expect, test } from "vitest";
import { Api } from "../src/api/api";
import { ApiError, ConnectionError, ProtocolError, retryAfter } from "../src/api/errors";
import { collect } from "./streams";

const REQUEST = { model: "m", messages: [] };
const never = new AbortController().signal;
let server: Server | undefined;

/** A real server that answers by `handle`, and a client of this server. */
async function serve(handle: (request: IncomingMessage, response: ServerResponse) => void, key = ""): Promise<Api> {
  server = createServer(handle);
  await new Promise<void>((resolve) => server!.listen(0, "127.0.0.1", resolve));
  return new Api(`http://127.0.0.1:${(server.address() as AddressInfo).port}/prefix/`, () => key);
}

afterEach(() => {
  server?.closeAllConnections();
  server?.close();
});

function eventStream(response: ServerResponse): void {
  response.writeHead(200, { "content-type": "text/event-stream; charset=utf-8" });
}

test("a chat is posted below the page's own address and asks for a stream with usage", async () => {
  let seen: { url?: string | undefined; key?: string | undefined; body: string } = { body: "" };
  const api = await serve(async (request, response) => {
    seen = { url: request.url, key: request.headers.authorization, body: "" };
    for await (const chunk of request) seen.body += String(chunk);
    eventStream(response);
    response.end('data: {"choices":[{"delta":{"content":"Hi"}}]}\r\n\r\ndata: [DONE]\r\n\r\n');
  }, "secret");
  expect(await collect(api.chat(REQUEST, never))).toEqual([{ kind: "text", text: "Hi" }]);
  expect(seen.url).toBe("/prefix/v1/chat/completions");
  expect(seen.key).toBe("Bearer secret");
  const stream_options = { include_usage: true, continuous_usage_stats: true };
  expect(JSON.parse(seen.body)).toEqual({ ...REQUEST, stream: true, stream_options });
});

test("an error reply carries the server's message, its code and the time to wait", async () => {
  const api = await serve((_, response) => {
    response.writeHead(429, { "retry-after": "7" });
    response.end('{"error": {"message": "too many requests", "code": "rate_limited"}}');
  });
  const error: unknown = await collect(api.chat(REQUEST, never)).catch((reason: unknown) => reason);
  expect(error).toBeInstanceOf(ApiError);
  expect(error).toMatchObject({
    message: "too many requests",
    code: "rate_limited",
    retryAfterSeconds: 7,
    isBusy: true,
  });
});

test("a proxy's error page becomes a sentence with its status", async () => {
  const api = await serve((_, response) => response.writeHead(502).end("<html>Bad Gateway</html>"));
  await expect(api.models()).rejects.toThrow("The server answered with status 502.");
});

test("a connection that breaks off in the middle is a lost connection", async () => {
  const api = await serve((_, response) => {
    eventStream(response);
    response.write('data: {"choices":[{"delta":{"content":"Hi"}}]}\n\n', () => response.destroy());
  });
  await expect(collect(api.chat(REQUEST, never))).rejects.toThrow(ConnectionError);
});

test("a server that takes requests says what it waits for", async () => {
  const ready = { status: "ready", models: [], waits_for: "No engine has been found yet." };
  const api = await serve((_, response) => response.end(JSON.stringify(ready)));
  expect(await api.readiness()).toEqual({ status: 200, waitsFor: "No engine has been found yet." });
});

test("a server that shuts down takes no requests", async () => {
  const api = await serve((_, response) => response.writeHead(503).end("{}"));
  expect(await api.readiness()).toEqual({ status: 503, waitsFor: null });
});

test("a server that is not there is a connection error", async () => {
  const api = await serve(() => undefined);
  await new Promise((resolve) => server!.close(resolve));
  await expect(api.readiness()).rejects.toThrow(ConnectionError);
  await expect(collect(api.chat(REQUEST, never))).rejects.toThrow(ConnectionError);
});

test("a reply that breaks off is a lost connection, also if it is no stream", async () => {
  const api = await serve((_, response) => {
    response.writeHead(200, { "content-type": "application/json", "content-length": "100" });
    response.write('{"waits_for":', () => response.destroy());
  });
  await expect(api.readiness()).rejects.toThrow(ConnectionError);
  await expect(api.models()).rejects.toThrow(ConnectionError);
});

test("a reply that is no stream is not read as one", async () => {
  const api = await serve((_, response) => response.writeHead(200, { "content-type": "text/html" }).end("Log in"));
  await expect(collect(api.chat(REQUEST, never))).rejects.toThrow(ProtocolError);
});

test("stopping closes the connection, so that the server stops as well", async () => {
  let closed: () => void = () => undefined;
  const closing = new Promise<void>((resolve) => (closed = resolve));
  const api = await serve((_, response) => {
    response.on("close", closed);
    eventStream(response);
    response.write('data: {"choices":[{"delta":{"content":"Hi"}}]}\n\n');
  });
  const stop = new AbortController();
  await expect(async () => {
    for await (const _ of api.chat(REQUEST, stop.signal)) stop.abort();
  }).rejects.toThrow(/abort/i);
  await closing;
});

test("a request can be stopped before the server answers", async () => {
  const stop = new AbortController();
  const api = await serve(() => stop.abort());
  await expect(collect(api.chat(REQUEST, stop.signal))).rejects.toThrow(/abort/i);
});

test("Retry-After holds seconds or a date", () => {
  const now = Date.parse("Wed, 21 Oct 2026 07:28:00 GMT");
  expect(retryAfter("12")).toBe(12);
  expect(retryAfter("Wed, 21 Oct 2026 07:28:30 GMT", now)).toBe(30);
  expect(retryAfter("Wed, 21 Oct 2026 07:27:00 GMT", now)).toBe(0);
  expect(retryAfter("soon")).toBeUndefined();
  expect(retryAfter(null)).toBeUndefined();
});
