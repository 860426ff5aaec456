import { effect, signal, type Signal } from "@preact/signals";
import type { ChatRequest } from "../api/wire";

/** The person's settings: the model, how its answers are sampled, and the API key. `null` lets the server choose. */
export interface Settings {
  systemPrompt: string;
  temperature: number;
  topK: number | null;
  topP: number;
  maxTokens: number | null;
  seed: number | null;
  /** The id of the model that answers; empty for the first model that the server offers. */
  model: string;
  apiKey: string;
}

export const DEFAULTS: Readonly<Settings> = {
  systemPrompt: "",
  // Lower than the usual 1, because small models need a lower temperature than large ones.
  temperature: 0.6,
  topK: 50,
  topP: 1,
  maxTokens: null,
  seed: null,
  model: "",
  apiKey: "",
};

/** The ranges of the numbers in the settings. The gateway accepts every number in these ranges. */
export const LIMITS = {
  temperature: { min: 0, max: 2, step: 0.05 },
  topP: { min: 0.05, max: 1, step: 0.05 },
  topK: { min: 1, max: 1000, step: 1 },
  maxTokens: { min: 1, max: 1_000_000, step: 1 },
  seed: { min: 0, max: 2 ** 31 - 1, step: 1 },
} as const;

const KEY = "nanochat.settings";

/** The stored settings, which are stored again after each change. A missing or invalid value becomes its default. */
export function storedSettings(storage: Storage | null): Signal<Settings> {
  const settings = signal<Settings>({ ...DEFAULTS, ...usableSettings(read(storage)) });
  effect(() => {
    const text = JSON.stringify(settings.value);
    try {
      storage?.setItem(KEY, text);
    } catch (error) {
      // If the storage is full, the settings last until the page is closed. The conversation store reports the problem.
      if (!(error instanceof DOMException)) throw error;
    }
  });
  return settings;
}

/** The sampling parameters of a request. */
export function sampling(settings: Settings): Partial<ChatRequest> {
  const { temperature, topK, topP, maxTokens, seed } = settings;
  return {
    temperature,
    top_p: topP,
    ...(topK === null ? {} : { top_k: topK }),
    ...(maxTokens === null ? {} : { max_tokens: maxTokens }),
    ...(seed === null ? {} : { seed }),
  };
}

function read(storage: Storage | null): Record<string, unknown> {
  try {
    const value: unknown = JSON.parse(storage?.getItem(KEY) ?? "{}");
    return typeof value === "object" && value !== null ? (value as Record<string, unknown>) : {};
  } catch {
    return {};
  }
}

/** The stored values that belong to settings of this page and lie in their ranges. */
export function usableSettings(stored: Record<string, unknown>): Partial<Settings> {
  const result: Record<string, unknown> = {};
  for (const [name, fallback] of Object.entries(DEFAULTS)) {
    const value = stored[name];
    if (name in LIMITS) {
      const { min, max } = LIMITS[name as keyof typeof LIMITS];
      const inRange = typeof value === "number" && value >= min && value <= max;
      if (inRange || (value === null && (fallback === null || name === "topK"))) result[name] = value;
    } else if (typeof value === typeof fallback) {
      result[name] = value;
    }
  }
  return result as Partial<Settings>;
}
