// Vercel's AI SDK with its defaults, which are the Responses API and references to stored items.
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";

const openai = createOpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "unused" });
const model = openai("nano");
const options = { model, maxRetries: 0 };
const calls = [];
const tools = {
  get_weather: tool({
    description: "The weather of a city.",
    inputSchema: jsonSchema({
      type: "object",
      properties: { city: { type: "string" } },
      required: ["city"],
      additionalProperties: false,
    }),
    execute: async (input) => {
      calls.push(input);
      return `22 degrees in ${input.city}`;
    },
  }),
};

const whole = await generateText({ ...options, prompt: "hi" });
let streamed = "";
for await (const text of streamText({ ...options, prompt: "hi" }).textStream) streamed += text;
const steps = await generateText({ ...options, prompt: "What is the weather?", tools, stopWhen: stepCountIs(3) });
const chat = await generateText({ ...options, model: openai.chat("nano"), prompt: "hi" });

console.log(JSON.stringify({ whole: whole.text, streamed, call: calls[0], after_call: steps.text, chat: chat.text }));
