import { chatParts } from "./chat-stream";
import type { LessonDetails, LessonList, NewLesson } from "../lessons/lesson";
import { ApiError, ConnectionError, ProtocolError } from "./errors";
import type { ChatPart, ChatRequest, ModelInfo } from "./wire";

export interface Readiness {
  /** HTTP status; 200 means that the server accepts requests. */
  status: number;
  /** A sentence about what the server waits for before it can answer; null if it can answer now. */
  waitsFor: string | null;
}

/** Asks the server for token counts while it writes an answer, so that the page can show the rate. */
const USAGE = { include_usage: true, continuous_usage_stats: true };

/** The part of the gateway's REST API that this page needs. Addresses are relative to `base`. */
export class Api {
  constructor(
    private readonly base: string,
    private readonly apiKey: () => string = () => "",
  ) {}

  /** Asks the server whether it can answer. Throws ConnectionError if no server answers. */
  async readiness(): Promise<Readiness> {
    const response = await this.request("readyz", { cache: "no-store", signal: AbortSignal.timeout(10_000) });
    if (!response.ok) return { status: response.status, waitsFor: null };
    return { status: response.status, waitsFor: (await bodyOf<{ waits_for: string | null }>(response)).waits_for };
  }

  async models(): Promise<ModelInfo[]> {
    return (await this.json<{ data: ModelInfo[] }>("v1/models", { cache: "no-store" })).data;
  }

  /** Streams an answer. Aborting `signal` closes the connection, which stops the model. */
  async *chat(request: ChatRequest, signal: AbortSignal): AsyncGenerator<ChatPart> {
    const response = await this.request("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json", accept: "text/event-stream" },
      body: JSON.stringify({ ...request, stream: true, stream_options: USAGE }),
      signal,
    });
    if (!response.ok) throw await ApiError.fromResponse(response);
    if (!response.body || !response.headers.get("content-type")?.startsWith("text/event-stream")) {
      throw new ProtocolError("the server answered with something that is not a stream");
    }
    yield* chatParts(response.body);
  }

  /** The newest lessons, or the newest of the lessons that are older than the lesson `after`. */
  lessons(after?: number): Promise<LessonList> {
    const older = after === undefined ? "" : `&after=${after}`;
    return this.json(`v1/lessons?order=desc${older}`, { cache: "no-store" });
  }

  lesson(number: number): Promise<LessonDetails> {
    return this.json(`v1/lessons/${number}`, { cache: "no-store" });
  }

  /** Adds a lesson. A second call with the same `key` adds no second lesson. */
  async teach(lesson: NewLesson, key: string): Promise<void> {
    const headers = { "content-type": "application/json", "idempotency-key": key };
    await this.json("v1/lessons", { method: "POST", headers, body: JSON.stringify(lesson) });
  }

  async changeLesson(number: number, change: "cancel" | "roll_back"): Promise<void> {
    await this.json(`v1/lessons/${number}/${change}`, { method: "POST" });
  }

  private async json<T>(path: string, init: RequestInit): Promise<T> {
    const response = await this.request(path, init);
    if (!response.ok) throw await ApiError.fromResponse(response);
    return bodyOf(response);
  }

  private async request(path: string, init: RequestInit): Promise<Response> {
    const headers = new Headers(init.headers);
    const key = this.apiKey();
    if (key) headers.set("authorization", `Bearer ${key}`);
    try {
      return await fetch(new URL(path, this.base), { ...init, headers });
    } catch (cause) {
      if (init.signal?.aborted && cause instanceof DOMException && cause.name === "AbortError") throw cause;
      throw new ConnectionError("the server could not be reached", { cause });
    }
  }
}

/** Reads the JSON of a response. Throws ConnectionError if the connection is lost before all of it has arrived. */
async function bodyOf<T>(response: Response): Promise<T> {
  const text = await response.text().catch((cause: unknown) => {
    throw new ConnectionError("the connection was lost", { cause });
  });
  return JSON.parse(text) as T;
}
