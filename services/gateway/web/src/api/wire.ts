/** Messages between this page and the gateway: OpenAI's chat format plus the `nanochat` extension. */

export interface ToolCall {
  type: "call";
  call_index: number;
  code: string;
  /** Number of Unicode code points of the answer's text before the call. */
  offset: number;
}

export interface Picture {
  name: string;
  media_type: string;
  /** The picture in base64. */
  data: string;
}

export interface ToolResult {
  type: "result";
  call_index: number;
  /** "ok", or the sandbox's reason for failing: "error", "timeout", "memory", … */
  status: string;
  output: string;
  duration_seconds: number;
  pictures?: Picture[];
}

export type ToolEvent = ToolCall | ToolResult;

export interface RequestMessage {
  role: "system" | "user" | "assistant";
  content: string;
  nanochat?: { tool_events: ToolEvent[] };
}

export interface ChatRequest {
  model: string;
  messages: RequestMessage[];
  temperature?: number;
  top_k?: number;
  top_p?: number;
  max_tokens?: number;
  seed?: number;
  /** "auto" leaves out the oldest turns if the conversation is longer than the model's context. */
  truncation?: "auto";
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  prompt_tokens_details?: { cached_tokens?: number } | null;
}

export interface ModelInfo {
  id: string;
  /** Fields that OpenAI's API does not have. Servers of earlier versions send no `examples`. */
  nanochat?: { examples?: string[] };
}

/** One part of a streamed answer. */
export type ChatPart =
  | { kind: "text"; text: string }
  | { kind: "tool"; event: ToolEvent }
  /** The number of turns at the beginning of the conversation that the model does not see. */
  | { kind: "left-out"; turns: number }
  | { kind: "finish"; reason: string }
  | { kind: "usage"; usage: Usage };
