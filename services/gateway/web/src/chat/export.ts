import type { Conversation } from "./conversation";
import { turnsOf } from "./history";
import { pictureUrl } from "./pictures";
import { segments } from "./segments";

/** The conversation in the API's format: a request to /v1/chat/completions can use its messages unchanged. */
export function toJson(conversation: Conversation): string {
  const { title, createdAt } = conversation.header.peek();
  const messages = turnsOf(conversation.snapshot()).map((turn) => turn.message);
  return `${JSON.stringify({ title: title.value, created: new Date(createdAt).toISOString(), messages }, null, 2)}\n`;
}

/** The conversation as Markdown, with tool calls as code blocks and their pictures. */
export function toMarkdown(conversation: Conversation): string {
  const parts = [`# ${conversation.title.peek()}`];
  for (const message of conversation.snapshot()) {
    parts.push(message.role === "user" ? "## You" : "## nanochat");
    if (message.role === "user") {
      parts.push(message.content);
      continue;
    }
    for (const segment of segments(message.content, message.toolEvents)) {
      if (segment.kind === "text") {
        parts.push(segment.text.trim());
      } else {
        parts.push(fenced("python", segment.call.code));
        if (segment.result) parts.push(fenced("text", segment.result.output));
        for (const picture of segment.result?.pictures ?? []) parts.push(`![](${pictureUrl(picture)})`);
      }
    }
  }
  return `${parts.join("\n\n")}\n`;
}

/** A code block whose fence is longer than any run of backticks in it. */
function fenced(language: string, code: string): string {
  const longest = Math.max(2, ...Array.from(code.matchAll(/`+/g), (run) => run[0].length));
  const fence = "`".repeat(longest + 1);
  return `${fence}${language}\n${code.replace(/\n$/, "")}\n${fence}`;
}

/** A file name made from the letters and digits of a title. */
export function fileName(title: string, extension: string): string {
  const stem = title
    .toLowerCase()
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-+|-+$/g, "");
  return `${stem || "conversation"}.${extension}`;
}

/** Lets the browser download a text as a file. */
export function download(name: string, type: string, text: string): void {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  URL.revokeObjectURL(url);
}
