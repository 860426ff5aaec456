/** The backup file: all conversations with all versions of their messages, and the settings. */

import type { RequestMessage } from "../api/wire";
import { checkHeader, checkMessage } from "../storage/stored-format";
import type { Settings } from "../storage/settings";
import { newId } from "./id";
import { newHeader, type StoredConversation } from "./merge";
import { assistantMessage, settled, userMessage, type Message } from "./message";
import { titleOf } from "./title";

const FORMAT = "nanochat-archive";

export interface Archive {
  conversations: StoredConversation[];
  /** The settings in the file, not checked yet; empty if the file has none. */
  settings: Record<string, unknown>;
}

/** Returns the content of a backup file. The API key is left out, because people may give the file to others. */
export function toArchive(conversations: readonly StoredConversation[], { apiKey: _, ...settings }: Settings): string {
  const settledOnes = conversations.map(({ header, messages }) => ({ header, messages: messages.map(settled) }));
  return `${JSON.stringify({ format: FORMAT, version: 2, settings, conversations: settledOnes }, null, 1)}\n`;
}

/** Reads a backup file, or the JSON export of a single conversation. Throws if the text is neither. */
export function fromArchive(text: string): Archive {
  const value = JSON.parse(text) as Partial<Archive & SingleExport> & { format?: unknown };
  if (value.format !== FORMAT) return { conversations: [fromExport(value)], settings: {} };
  const conversations = value.conversations!.map(({ header, messages }) => ({
    header: checkHeader(header),
    messages: messages.map(checkMessage),
  }));
  return { conversations, settings: value.settings ?? {} };
}

/** The object that `toJson` writes: the messages in the format of the API. */
interface SingleExport {
  title: string;
  created: string;
  messages: RequestMessage[];
}

function fromExport({ title, created, messages }: Partial<SingleExport>): StoredConversation {
  if (!Array.isArray(messages) || messages.length === 0) throw new Error("not an export of this page");
  const createdAt = Date.parse(created ?? "") || Date.now();
  let parent: string | null = null;
  const converted = messages
    .filter((message) => message.role !== "system")
    .map(({ role, content, nanochat }): Message => {
      const message: Message =
        role === "user"
          ? userMessage(content, parent)
          : { ...assistantMessage(parent), content, state: "complete", toolEvents: nanochat?.tool_events ?? [] };
      parent = message.id;
      return checkMessage({ ...message, createdAt });
    });
  const name = typeof title === "string" ? title : titleOf(converted[0]?.content ?? "");
  return { header: newHeader(newId(), name, createdAt), messages: converted };
}
