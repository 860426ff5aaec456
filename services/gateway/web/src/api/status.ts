import { ApiError, ConnectionError } from "./errors";

/** The state of an engine at the gateway's last check. */
export interface EngineStatus {
  address: string;
  up: boolean;
  why_down: string | null;
  model: string | null;
  revision: string | null;
  running: number;
  waiting: number;
  parked: number;
  waiting_tokens: number;
  /** Share of the KV cache in use, from 0 to 1. */
  kv_use: number;
}

export interface LimitSet {
  requests: number;
  tokens: number;
  answers: number;
}

/** The current state of the gateway, and its counters since its start. */
export interface GatewayStatus {
  requests_in_flight: number;
  queue_length: number;
  prompt_tokens: number;
  cached_prompt_tokens: number;
  generation_tokens: number;
  streams_lost: number;
  draining: boolean;
}

export interface KeyInfo {
  id: string;
  name: string;
  scopes: string[];
  limits: LimitSet | null;
  state: string;
}

/** The usage of a key on one day. */
export interface KeyUsage {
  day: string;
  key: string;
  requests: number;
  refused: number;
  prompt_tokens: number;
  completion_tokens: number;
}

export interface Status {
  engines: EngineStatus[];
  gateway: GatewayStatus;
  limits: LimitSet;
  keys: KeyInfo[];
  usage: KeyUsage[];
}

/** Reads all data of the operator's page. Throws ApiError (for a wrong key, too) or ConnectionError. */
export async function loadStatus(base: string, key: string): Promise<Status> {
  const get = async (path: string): Promise<unknown> => {
    const headers = { authorization: `Bearer ${key}` };
    const response = await fetch(new URL(path, base), { headers, cache: "no-store" }).catch((cause: unknown) => {
      throw new ConnectionError("the server could not be reached", { cause });
    });
    if (!response.ok) throw await ApiError.fromResponse(response);
    return response.json();
  };
  const [now, keys, usage] = await Promise.all([get("admin/status"), get("admin/keys"), get("admin/usage?days=7")]);
  return {
    ...(now as Pick<Status, "engines" | "gateway" | "limits">),
    keys: (keys as { data: KeyInfo[] }).data,
    usage: (usage as { data: KeyUsage[] }).data,
  };
}
