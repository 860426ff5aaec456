"""Calls of the client's tools come out of the model's text, however the text is cut."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.answer.choice_decoder import Delta
from services.gateway.answer.tool_calls import CallReader
from services.gateway.engines.request import call_text, describe_tools
from services.gateway.schemas import ChatRequest, FunctionCall, FunctionTool, call_schema

PLAIN = "plain {x}"
CALL = '{"name": "get", "arguments": {"city": "Oslo", "of": {"a": 1}}}'


def read(pieces: list[str], finish: str = "stop", stop_string: str | None = None) -> Delta:
    reader, whole = CallReader(), Delta()
    for piece in pieces:
        whole.append(reader.read(Delta(piece)))
    whole.append(reader.read(Delta(finish_reason=finish, stop_string=stop_string)))
    return whole


def tool(name: str, parameters: Any = None) -> FunctionTool:
    return FunctionTool.model_validate({"type": "function", "function": {"name": name, "parameters": parameters}})


@given(
    text=st.sampled_from([CALL, '{"name":"get","arguments":{"city":"Oslo","of":{"a":1}}}', PLAIN]),
    cuts=st.lists(st.integers(0, 70), max_size=6),
)
def test_the_cut_of_the_text_changes_nothing(text: str, cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    whole = read(pieces)
    if text == PLAIN:
        assert (whole.text, whole.call, whole.finish_reason) == (text, None, "stop")
        return
    assert (whole.text, whole.finish_reason, whole.call.name) == ("", "tool_calls", "get")
    assert json.loads(whole.call.arguments) == {"city": "Oslo", "of": {"a": 1}}
    assert not whole.call.arguments.startswith(" ")
    assert whole.call.id.startswith("call_")


@pytest.mark.parametrize("length", range(len('{"name": "get", "arguments": ') + 1))
def test_a_call_that_ends_before_its_name_is_complete_is_text(length: int) -> None:
    whole = read(list(CALL[:length]), "length")
    assert (whole.text, whole.call, whole.finish_reason) == (CALL[:length], None, "length")


def test_a_call_that_ends_within_its_arguments_keeps_them() -> None:
    whole = read(list(CALL[:-1]), "length")
    assert (whole.call.arguments, whole.finish_reason) == ('{"city": "Oslo", "of": {"a": 1}}', "length")


@pytest.mark.parametrize("last", ['"of": {"a": 1}', '"of": {"a": 1}}'])
def test_a_call_that_a_stop_string_cuts_is_not_complete(last: str) -> None:
    arguments = '{"city": "Oslo", ' + last
    whole = read(list('{"name": "get", "arguments": ' + arguments), "stop", stop_string=",")
    assert (whole.text, whole.call.arguments, whole.finish_reason) == ("", arguments, "stop")


def test_a_call_sent_back_is_the_text_that_the_model_wrote() -> None:
    call = read([CALL]).call
    assert call_text(FunctionCall(name=call.name, arguments=call.arguments)) == CALL


def test_the_instructions_have_each_function_on_a_line() -> None:
    _, *lines = describe_tools([tool("a"), tool("b", {"type": "object"})]).split("\n")
    assert [json.loads(line) for line in lines] == [{"name": "a"}, {"name": "b", "parameters": {"type": "object"}}]


def test_references_in_the_schema_of_a_tool_stay_within_it() -> None:
    parameters = {
        "properties": {"place": {"$ref": "#/$defs/Place"}, "whole": {"$ref": "#"}},
        "$defs": {"Place": {"type": "string"}},
    }
    found = call_schema([tool("get", parameters)])["$defs"]["get"]
    assert found["type"] == "object"
    assert found["properties"] == {"place": {"$ref": "#/$defs/get/$defs/Place"}, "whole": {"$ref": "#/$defs/get"}}


def test_data_in_the_schema_of_a_tool_stays_as_it_is() -> None:
    data = {"$ref": "#/x"}
    properties = {
        "a": {"const": data, "default": data, "enum": [data], "examples": [data]},
        "default": {"$ref": "#/$defs/enum"},  # a property and a definition may have the name of a keyword
    }
    found = call_schema([tool("get", {"properties": properties, "$defs": {"enum": {"$ref": "#"}}})])["$defs"]["get"]
    assert found["properties"]["a"] == properties["a"]
    assert found["properties"]["default"] == {"$ref": "#/$defs/get/$defs/enum"}
    assert found["$defs"] == {"enum": {"$ref": "#/$defs/get"}}


def test_a_tool_without_parameters_takes_none() -> None:
    expected = {"type": "object", "additionalProperties": False, "properties": {}}
    assert call_schema([tool("get")])["$defs"]["get"] == expected


@pytest.mark.parametrize(
    ("choice", "field", "names"),
    [
        (None, "text_or_json_schema", ["a", "b"]),
        ("auto", "text_or_json_schema", ["a", "b"]),
        ("required", "json_schema", ["a", "b"]),
        ({"type": "function", "function": {"name": "b"}}, "json_schema", ["b"]),
        ("none", None, []),
    ],
)
def test_the_choice_of_a_tool_constrains_the_answer(choice: Any, field: Any, names: list[str]) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("a", "b")]
    body = ChatRequest.model_validate(
        {"messages": [{"role": "user", "content": "x"}], "tools": tools, "tool_choice": choice}
    )
    if field is None:
        assert (body.constraint, body.offered_tools) == (None, [])
        return
    assert body.constraint.field == field
    assert list(json.loads(body.constraint.value)["$defs"]) == names
    assert [each.function.name for each in body.offered_tools] == ["a", "b"]
