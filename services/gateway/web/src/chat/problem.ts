import { ApiError, ConnectionError } from "../api/errors";

/** The reason for a missing or incomplete answer, as it is stored and shown. */
export interface Problem {
  kind: "interrupted" | "unreachable" | "busy" | "context" | "key" | "rejected";
  /** The message of the server or the network. */
  detail: string;
}

/** The problem that an error causes. `begun` says whether a part of the answer had arrived. */
export function problemOf(error: unknown, begun: boolean): Problem {
  const detail = error instanceof Error ? error.message : String(error);
  if (error instanceof ApiError) {
    if (error.status === 401 || error.status === 403) return { kind: "key", detail };
    if (isTooLong(error)) return { kind: "context", detail };
    if (error.isBusy) return { kind: "busy", detail };
    // An error event in a stream has no status, because the server had already begun to answer.
    if (error.status !== undefined && error.status < 500) return { kind: "rejected", detail };
  }
  if (error instanceof ConnectionError && !begun) return { kind: "unreachable", detail };
  return { kind: "interrupted", detail };
}

/**
 * Whether an error says that the last message alone is too long for the model. The server has already left out the
 * oldest messages, because this page asks for that.
 */
function isTooLong({ code, status, message }: ApiError): boolean {
  return code === "context_length_exceeded" || status === 413 || (status === 400 && /context/i.test(message));
}

/** The first sentence of a shown problem. For some kinds, the page shows `detail` below it. */
export function headline(problem: Problem): string {
  switch (problem.kind) {
    case "interrupted":
      return `The answer was interrupted: ${problem.detail}`;
    case "unreachable":
      return "The server could not be reached. Your message is safe; try again when it is back.";
    case "busy":
      return "The server is still busy. Please try again in a moment.";
    case "context":
      return "Your message is longer than the model can read at once. Shorten it with the pencil, or send it in parts.";
    case "key":
      return "This server asks for an API key. You can enter yours in the settings.";
    case "rejected":
      return `The server did not accept this: ${problem.detail}`;
  }
}
