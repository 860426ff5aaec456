import { ApiError, ConnectionError, ProtocolError } from "./errors";
import { serverSentEvents } from "./sse";
import type { ChatPart, ToolEvent, Usage } from "./wire";

interface Chunk {
  choices?: {
    delta?: { content?: string | null; nanochat?: { tool_events?: ToolEvent[]; left_out_turns?: number } };
    finish_reason?: string | null;
  }[];
  usage?: Usage | null;
  error?: { message?: string; code?: string | null };
}

/**
 * Yields the parts of a streamed chat completion.
 *
 * Throws ApiError if the stream carries an error event, ConnectionError if it ends without `[DONE]`,
 * ProtocolError if the data of an event is not a JSON object.
 */
export async function* chatParts(body: ReadableStream<Uint8Array>): AsyncGenerator<ChatPart> {
  for await (const { data } of serverSentEvents(body)) {
    if (data === "[DONE]") return;
    const chunk = parse(data);
    if (chunk.error) {
      throw new ApiError(chunk.error.message ?? "The server gave no reason.", { code: chunk.error.code });
    }
    const choice = chunk.choices?.[0];
    const leftOut = choice?.delta?.nanochat?.left_out_turns;
    if (leftOut) yield { kind: "left-out", turns: leftOut };
    if (choice?.delta?.content) yield { kind: "text", text: choice.delta.content };
    for (const event of choice?.delta?.nanochat?.tool_events ?? []) yield { kind: "tool", event };
    if (choice?.finish_reason) yield { kind: "finish", reason: choice.finish_reason };
    if (chunk.usage) yield { kind: "usage", usage: chunk.usage };
  }
  throw new ConnectionError("the connection was lost before the answer was complete");
}

function parse(data: string): Chunk {
  let chunk: unknown;
  try {
    chunk = JSON.parse(data);
  } catch (cause) {
    throw unreadable({ cause });
  }
  if (typeof chunk !== "object" || chunk === null) throw unreadable();
  return chunk;
}

function unreadable(options?: ErrorOptions): ProtocolError {
  return new ProtocolError("the server sent something that this page cannot read", options);
}
