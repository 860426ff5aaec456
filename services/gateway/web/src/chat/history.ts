import type { RequestMessage } from "../api/wire";
import type { Message } from "./message";
import { withoutPictures } from "./pictures";
import { finishedEvents } from "./segments";

// Largest number of characters in a request's turns, unless the newest question alone is longer. This is far more than a
// model's context has room for, and well below the size of a request that the server accepts.
export const MOST_CHARACTERS = 200_000;
const MOST_TURNS = 1_000;

/** A message of a request, and the id of the first message of the page that it contains. */
export interface Turn {
  id: string;
  message: RequestMessage;
}

/**
 * Returns the turns of a request. Answers carry their tool events, so that the server rebuilds exactly the tokens that
 * the model wrote; pictures are not sent. Empty answers are left out, and the questions before and after them become
 * one question, because a chat model knows only alternating turns. Questions that were too long for the model are left
 * out too: otherwise they would make every later question too long.
 */
export function turnsOf(messages: readonly Message[]): Turn[] {
  const result: Turn[] = [];
  for (const message of messages) {
    const { id, content } = message;
    if (message.role === "assistant") {
      const events = withoutPictures(finishedEvents(message.toolEvents));
      if (content === "" && events.length === 0) {
        if (message.problem?.kind === "context" && result.at(-1)?.message.role === "user") result.pop();
        continue;
      }
      const extension = events.length > 0 ? { nanochat: { tool_events: events } } : {};
      result.push({ id, message: { role: "assistant", content, ...extension } });
      continue;
    }
    const last = result.at(-1)?.message;
    if (last?.role === "user") last.content += `\n\n${content}`;
    else result.push({ id, message: { role: "user", content } });
  }
  return result;
}

/** The newest turns of a conversation that a request has room for, beginning with a question. */
export function newestTurns(turns: readonly Turn[]): readonly Turn[] {
  let room = MOST_CHARACTERS;
  let first = turns.length;
  for (let index = turns.length - 1; index >= 0 && turns.length - index <= MOST_TURNS; index -= 1) {
    room -= JSON.stringify(turns[index]!.message).length;
    if (room < 0 && first < turns.length) break;
    if (turns[index]!.message.role === "user") first = index;
  }
  return first < turns.length ? turns.slice(first) : turns;
}

export function requestMessages(turns: readonly Turn[], systemPrompt: string): RequestMessage[] {
  const messages = turns.map((turn) => turn.message);
  return systemPrompt.trim() === "" ? messages : [{ role: "system", content: systemPrompt }, ...messages];
}
