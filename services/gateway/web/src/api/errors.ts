/** The three ways in which a request can fail. If the person stops an answer, this is not a failure. */

export interface ErrorDetails {
  status?: number | undefined;
  code?: string | null | undefined;
  retryAfterSeconds?: number | undefined;
}

/** The server answered, and its answer is an error. */
export class ApiError extends Error {
  readonly status: number | undefined;
  readonly code: string | null | undefined;
  readonly retryAfterSeconds: number | undefined;

  constructor(message: string, details: ErrorDetails = {}) {
    super(message);
    this.name = "ApiError";
    this.status = details.status;
    this.code = details.code;
    this.retryAfterSeconds = details.retryAfterSeconds;
  }

  /** Whether the same request may succeed a little later. */
  get isBusy(): boolean {
    return this.status === 429 || this.status === 503;
  }

  static async fromResponse(response: Response): Promise<ApiError> {
    const text = await response.text().catch(() => "");
    let error: { message?: unknown; code?: unknown } = {};
    try {
      error = (JSON.parse(text) as { error?: typeof error }).error ?? {};
    } catch {
      // A body that is not JSON comes from a proxy and not from the gateway. Only the response's status is used.
    }
    return new ApiError(
      typeof error.message === "string" ? error.message : `The server answered with status ${response.status}.`,
      {
        status: response.status,
        code: typeof error.code === "string" ? error.code : null,
        retryAfterSeconds: retryAfter(response.headers.get("retry-after")),
      },
    );
  }
}

/** The server could not be reached, or the connection was lost before the answer was complete. */
export class ConnectionError extends Error {
  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = "ConnectionError";
  }
}

/** The server's message does not follow the protocol. */
export class ProtocolError extends Error {
  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = "ProtocolError";
  }
}

/** Seconds to wait, from a Retry-After header with seconds or a date; undefined if the header has neither. */
export function retryAfter(header: string | null, now: number = Date.now()): number | undefined {
  if (header === null) return undefined;
  const seconds = /^\d+(\.\d+)?$/.test(header.trim()) ? Number(header) : (Date.parse(header) - now) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, seconds) : undefined;
}
