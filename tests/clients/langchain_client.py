"""langchain-openai: whole, streamed, with a tool, and with a conversation that is too long."""

import json
import sys

from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"22 degrees in {city}"


model = ChatOpenAI(base_url=f"{sys.argv[1]}/v1", api_key="unused", model="nano", max_retries=0)
bound = model.bind_tools([get_weather])
question = HumanMessage("What is the weather?")
first = bound.invoke([question])
result = get_weather.invoke(first.tool_calls[0])
try:
    model.invoke("x" * 5000)
    overflow = ""
except ContextOverflowError as error:
    overflow = str(error)
greeted = model.invoke([AIMessage("Hello!"), HumanMessage("hi")])

print(
    json.dumps(
        {
            "whole": model.invoke("hi").content,
            "streamed": "".join(str(chunk.content) for chunk in model.stream("hi")),
            "call": first.tool_calls[0]["args"],
            "after_call": bound.invoke([question, first, result]).content,
            "greeted": greeted.content,
            "overflow": overflow,
        }
    )
)
