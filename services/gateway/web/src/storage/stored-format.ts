/** Reads what is stored or imported, which a person or another version of this page may have changed. */

import { newHeader, type Header, type Register, type StoredConversation } from "../chat/merge";
import { settled, type Message } from "../chat/message";

const STATES = ["streaming", "interrupted", "stopped", "complete"];

/** Reads the header of a conversation from JSON. Throws if the text is not a header. */
export function parseHeader(text: string): Header {
  return checkHeader(JSON.parse(text));
}

/** Reads a message from JSON. Throws if the text is not a message. */
export function parseMessage(text: string): Message {
  return checkMessage(JSON.parse(text));
}

export function checkHeader(value: unknown): Header {
  const header = value as Partial<Header> | null;
  const valid =
    header?.version === 2 &&
    isId(header.id) &&
    Number.isFinite(header.createdAt) &&
    Number.isFinite(header.updatedAt) &&
    isRegister(header.title, "string") &&
    isRegister(header.deleted, "boolean") &&
    isObject(header.chosen) &&
    Object.values(header.chosen).every((register) => isRegister(register, "string"));
  if (!valid) throw new Error("not a conversation");
  return header as Header;
}

export function checkMessage(value: unknown): Message {
  const message = value as Partial<Message> | null;
  const common =
    isId(message?.id) &&
    (message?.parent === null || isId(message?.parent)) &&
    Number.isFinite(message?.createdAt) &&
    typeof message?.content === "string";
  const valid = common && (message?.role === "user" || isAnswer(message));
  if (!valid) throw new Error("not a message");
  return message as Message;
}

/**
 * Reads the first format, in which one entry held a conversation with a list of messages; null for another format.
 * The result is the same each time, so that two tabs that read the entry agree.
 */
export function parseConversationV1(text: string): StoredConversation | null {
  const value: unknown = JSON.parse(text);
  if (!isObject(value) || value.version !== 1) return null;
  const { id, title, createdAt, updatedAt, messages } = value;
  if (!isId(id) || typeof title !== "string" || !Array.isArray(messages)) throw new Error("not a conversation");
  let parent: string | null = null;
  const converted = messages.map((message: object, index) => {
    const placed = checkMessage({ ...message, parent, createdAt: Number(createdAt) + index });
    parent = placed.id;
    return settled(placed);
  });
  const header = { ...newHeader(id, title, createdAt as number), updatedAt: updatedAt as number };
  return { header: checkHeader(header), messages: converted };
}

function isAnswer(message: Partial<Message> | null): boolean {
  return message?.role === "assistant" && STATES.includes(String(message.state)) && Array.isArray(message.toolEvents);
}

function isRegister(value: unknown, type: string): value is Register<unknown> {
  return isObject(value) && typeof value.value === type && Number.isFinite(value.at);
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null;
}

/** Whether a value can be an id. Ids are parts of the storage's keys and of the page's address. */
function isId(value: unknown): value is string {
  return typeof value === "string" && /^[\w-]+$/.test(value);
}
