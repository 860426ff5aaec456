/** Server-sent events over fetch, after the WHATWG HTML standard, section 9.2.6. */

import { ConnectionError } from "./errors";

export interface ServerSentEvent {
  event: string;
  data: string;
}

/**
 * Yields the events of a response body, however the network divides it into chunks.
 * Drops an incomplete event at the end of the stream, as the standard says. Comments yield nothing.
 * Throws ConnectionError when the connection breaks off, AbortError when the request was aborted.
 */
export async function* serverSentEvents(body: ReadableStream<Uint8Array>): AsyncGenerator<ServerSentEvent> {
  let event = "";
  let data: string[] = [];
  for await (const line of lines(body)) {
    if (line === "") {
      if (data.length > 0) yield { event: event || "message", data: data.join("\n") };
      event = "";
      data = [];
      continue;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    let value = colon < 0 ? "" : line.slice(colon + 1);
    if (value.startsWith(" ")) value = value.slice(1);
    if (field === "data") data.push(value);
    else if (field === "event") event = value;
  }
}

/** Yields whole lines without their ends: CR, LF or CRLF. After a CR at a chunk's end, waits for the next chunk. */
async function* lines(body: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const reader = body.getReader();
  const decoder = new TextDecoder(); // drops a byte order mark, and keeps the bytes of an incomplete character
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(brokenOff);
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      let start = 0;
      for (const end of rest.matchAll(/\r\n|\n|\r/g)) {
        const after = end.index + end[0].length;
        if (end[0] === "\r" && after === rest.length && !done) break;
        yield rest.slice(start, end.index);
        start = after;
      }
      rest = rest.slice(start);
      if (done) return;
    }
  } finally {
    // If the caller stops early, the connection is closed, so that the server stops too.
    reader.cancel().catch(() => undefined);
  }
}

function brokenOff(cause: unknown): never {
  if (cause instanceof DOMException && cause.name === "AbortError") throw cause;
  throw new ConnectionError("the connection was lost", { cause });
}
