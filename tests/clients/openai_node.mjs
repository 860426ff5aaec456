// openai-node: whole, streamed with its helpers, tools, Responses, and a Python call sent back as it came.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "unused", maxRetries: 0 });
const model = "nano";
const hi = [{ role: "user", content: "hi" }];
const tools = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather of a city.",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
      function: ({ city }) => `22 degrees in ${city}`,
      parse: JSON.parse,
    },
  },
];

const whole = await client.chat.completions.create({ model, messages: hi });
const streamed = await client.chat.completions.stream({ model, messages: hi }).finalContent();
const runner = client.chat.completions.runTools({
  model,
  messages: [{ role: "user", content: "What is the weather?" }],
  tools,
});
const calls = [];
runner.on("functionToolCall", (call) => calls.push(JSON.parse(call.arguments)));
const afterCall = await runner.finalContent();

const python = [{ role: "user", content: "python" }];
const message = await client.chat.completions.stream({ model, messages: python }).finalMessage();
const back = await client.chat.completions.create({ model, messages: [...python, message, ...hi] });

const response = await client.responses.create({ model, input: "hi" });
const events = client.responses.stream({ model, input: "hi" });
const final = await events.finalResponse();

console.log(
  JSON.stringify({
    whole: whole.choices[0].message.content,
    streamed,
    call: calls[0],
    after_call: afterCall,
    python: message.content,
    back: back.choices[0].message.content,
    response: response.output_text,
    response_streamed: final.output_text,
  }),
);
