"""litellm: whole, streamed, with a tool, and with a conversation that is too long."""

import json
import sys
from typing import Any

import litellm

WHERE: dict[str, Any] = {"model": "openai/nano", "api_base": f"{sys.argv[1]}/v1", "api_key": "unused", "num_retries": 0}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def ask(*messages: Any, **options: Any) -> Any:
    return litellm.completion(**WHERE, messages=list(messages), **options)


hi = {"role": "user", "content": "hi"}
question = {"role": "user", "content": "What is the weather?"}
message = ask(question, tools=[TOOL]).choices[0].message
call = message.tool_calls[0]
result = {"role": "tool", "tool_call_id": call.id, "content": "22 degrees"}
try:
    ask({"role": "user", "content": "x" * 5000})
    overflow = ""
except litellm.ContextWindowExceededError as error:
    overflow = str(error)

print(
    json.dumps(
        {
            "whole": ask(hi).choices[0].message.content,
            "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in ask(hi, stream=True)),
            "call": json.loads(call.function.arguments),
            "after_call": ask(question, message.model_dump(), result, tools=[TOOL]).choices[0].message.content,
            "greeted": ask({"role": "assistant", "content": "Hello!"}, hi).choices[0].message.content,
            "overflow": overflow,
        }
    )
)
