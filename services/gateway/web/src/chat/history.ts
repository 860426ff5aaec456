import type { RequestMessage } from "../api/wire";
import type { Message } from "./conversation";
import { finishedEvents } from "./segments";

/**
 * Returns the messages of a request. Answers carry their tool events, so that the server rebuilds exactly the tokens
 * that the model wrote. Empty answers are left out, and the questions around them become one, because a chat model
 * knows only alternating turns.
 */
export function requestMessages(messages: readonly Message[], systemPrompt: string): RequestMessage[] {
  const result: RequestMessage[] = [];
  if (systemPrompt.trim() !== "") result.push({ role: "system", content: systemPrompt });
  for (const message of messages) {
    if (message.role === "assistant") {
      const events = finishedEvents(message.toolEvents);
      if (message.content === "" && events.length === 0) continue;
      const extension = events.length > 0 ? { nanochat: { tool_events: events } } : {};
      result.push({ role: "assistant", content: message.content, ...extension });
      continue;
    }
    const last = result.at(-1);
    if (last?.role === "user") last.content += `\n\n${message.content}`;
    else result.push({ role: "user", content: message.content });
  }
  return result;
}
