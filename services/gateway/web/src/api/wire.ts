/** Messages between this page and the gateway: OpenAI's chat format plus the `nanochat` extension. */

export interface ToolCall {
  type: "call";
  call_index: number;
  code: string;
  /** Unicode code points of the answer's text that precede the call. */
  offset: number;
}

export interface ToolResult {
  type: "result";
  call_index: number;
  /** "ok", or the sandbox's reason for failing: "error", "timeout", "memory", … */
  status: string;
  output: string;
  duration_seconds: number;
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
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  prompt_tokens_details?: { cached_tokens?: number } | null;
}

export interface ModelInfo {
  id: string;
}

/** One part of a streamed answer. */
export type ChatPart =
  | { kind: "text"; text: string }
  | { kind: "tool"; event: ToolEvent }
  | { kind: "finish"; reason: string }
  | { kind: "usage"; usage: Usage };
