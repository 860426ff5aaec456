"""A request's messages become the turns that the model knows, and the turns become token ids."""

from typing import Any

import pytest

from nanochat_core.chat import AssistantStream, render_prompt
from nanochat_core.protos import engine_pb2
from nanochat_core.tokenizer import Tokenizer
from services.gateway.engines.model import ServedModel
from services.gateway.engines.request import Truncation, conversation, encode_chat, encode_prompt, ending
from services.gateway.errors import ApiError
from services.gateway.schemas import ChatMessage, ChatRequest, FunctionTool

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)] + [b"he", b"ll", b"hell", b"hello"])
SPECIAL = TOKENIZER.special_ids
MODEL = ServedModel(engine_pb2.ModelInfo(name="nano", context_length=64), TOKENIZER)


def messages(*pairs: tuple[str, object]) -> list[ChatMessage]:
    return [ChatMessage.model_validate({"role": role, "content": content}) for role, content in pairs]


def texts(*pairs: tuple[str, object]) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in conversation(messages(*pairs))]


def test_all_between_two_answers_is_one_user_turn_in_its_order() -> None:
    assert texts(
        ("system", "A"),
        ("developer", "B"),
        ("user", "C"),
        ("assistant", "D"),
        ("user", "E"),
        ("system", "F"),
        ("user", "G"),
    ) == [("system", "A\n\nB"), ("user", "C"), ("assistant", "D"), ("user", "E\n\nF\n\nG")]


def test_instructions_and_the_first_question_are_one_turn_of_the_prompt() -> None:
    apart, joined = messages(("system", "A"), ("user", "B")), messages(("user", "A\n\nB"))
    assert render_prompt(TOKENIZER, conversation(apart)) == render_prompt(TOKENIZER, conversation(joined))


@pytest.mark.parametrize(
    ("given", "turns"),
    [
        ([("assistant", "A"), ("user", "B")], [("assistant", "A"), ("user", "B")]),
        ([("system", "S"), ("assistant", "A"), ("user", "B")], [("user", "S"), ("assistant", "A"), ("user", "B")]),
        ([("user", "A"), ("assistant", "B"), ("assistant", "C")], [("user", "A"), ("assistant", "B\n\nC")]),
        ([("system", "S")], [("user", "S")]),
    ],
)
def test_whatever_order_clients_send_has_alternating_turns(given: Any, turns: Any) -> None:
    assert texts(*given) == turns


def test_calls_and_results_of_the_clients_tools_are_text_that_the_model_reads() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "get", "arguments": '{"city": "Oslo"}'}}
    history = [
        *messages(("user", "hello")),
        ChatMessage.model_validate({"role": "assistant", "content": None, "tool_calls": [call]}),
        ChatMessage.model_validate({"role": "tool", "tool_call_id": "c", "content": "22"}),
        *messages(("user", "so?")),
    ]
    tool = FunctionTool.model_validate({"type": "function", "function": {"name": "get", "description": "weather"}})
    system, *turns = [(turn.role, turn.text) for turn in conversation(history, [tool])]
    assert system[0] == "system"
    assert '{"name": "get", "description": "weather"}' in system[1]
    assert turns == [
        ("user", "hello"),
        ("assistant", '{"name": "get", "arguments": {"city": "Oslo"}}'),
        ("user", "get returned: 22\n\nso?"),
    ]


@pytest.mark.parametrize(
    ("roles", "flags", "expected"),
    [
        (["user"], {}, "answer"),
        (["user"], {"add_generation_prompt": False}, "nothing"),
        (["user", "assistant"], {}, "continue"),
        (["user", "assistant"], {"continue_final_message": True}, "continue"),
        (["user", "assistant"], {"continue_final_message": False}, "answer"),
        (["user", "assistant"], {"add_generation_prompt": True}, "answer"),
        (["user", "assistant"], {"add_generation_prompt": False}, "nothing"),
    ],
)
def test_the_prompt_ends_as_the_request_says(roles: list[str], flags: Any, expected: str) -> None:
    given = [{"role": role, "content": "x"} for role in roles]
    body = ChatRequest.model_validate({"messages": given, **flags})
    assert ending(body, conversation(body.messages)) == expected


def test_text_parts_are_joined_by_line_breaks() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert texts(("user", parts)) == [("user", "one\ntwo")]


def test_an_answer_sent_back_has_exactly_the_tokens_that_the_model_wrote() -> None:
    written = [
        *TOKENIZER.encode("héllo 😀 "),
        *[SPECIAL["<|python_start|>"], *TOKENIZER.encode("1+1"), SPECIAL["<|python_end|>"]],
        *[SPECIAL["<|output_start|>"], *TOKENIZER.encode("2"), SPECIAL["<|output_end|>"]],
        *[SPECIAL["<|python_start|>"], *TOKENIZER.encode("2+2"), SPECIAL["<|python_end|>"]],
        *[SPECIAL["<|output_start|>"], SPECIAL["<|output_end|>"]],
        *TOKENIZER.encode(" hello"),
    ]
    stream = AssistantStream(TOKENIZER)
    content = "".join(part.text for token in written for part in stream.push(token) if part.type == "text")
    events = [
        {"type": "call", "call_index": 0, "code": "1+1", "offset": 8},
        {"type": "result", "call_index": 0, "status": "ok", "output": "2", "duration_seconds": 0.1},
        {"type": "call", "call_index": 1, "code": "2+2", "offset": 8},
        {"type": "result", "call_index": 1, "status": "ok", "output": ""},
    ]
    history = ChatMessage.model_validate({"role": "assistant", "content": content, "nanochat": {"tool_events": events}})
    turns = conversation([*messages(("user", "hello")), history, *messages(("user", "hello"))])
    user = [SPECIAL["<|user_start|>"], *TOKENIZER.encode("hello"), SPECIAL["<|user_end|>"]]
    start, end = SPECIAL["<|assistant_start|>"], SPECIAL["<|assistant_end|>"]
    assert render_prompt(TOKENIZER, turns) == [TOKENIZER.bos_id, *user, start, *written, end, *user, start]


def test_a_call_without_a_result_stays_one() -> None:
    events = [{"type": "call", "call_index": 0, "code": "1", "offset": 0}]
    history = ChatMessage.model_validate({"role": "assistant", "content": "", "nanochat": {"tool_events": events}})
    turns = conversation([*messages(("user", "a")), history, *messages(("user", "b"))])
    assert [(part.type, part.text) for part in turns[1].parts] == [("python", "1")]


@pytest.mark.parametrize(
    ("events", "param"),
    [
        ([("call", 0, 4)], "tool_events[0].offset"),
        ([("call", 0, 2), ("call", 1, 1)], "tool_events[1].offset"),
        ([("call", 0, 10**4000)], "tool_events[0].offset"),
    ],
)
def test_tool_events_that_do_not_fit_are_refused_by_name(events: Any, param: str) -> None:
    sent = [
        {"type": kind, "call_index": index, "code": "c", "output": "o", "offset": offset}
        for kind, index, offset in events
    ]
    history = ChatMessage.model_validate({"role": "assistant", "content": "abc", "nanochat": {"tool_events": sent}})
    with pytest.raises(ApiError) as refused:
        conversation([*messages(("user", "a")), history, *messages(("user", "b"))])
    assert refused.value.param == f"messages[1].nanochat.{param}"
    assert len(refused.value.message) < 400


@pytest.mark.parametrize(
    ("events", "kept"),
    [
        ([("result", 0)], ["text"]),
        ([("call", 0), ("result", 1)], ["python", "text"]),
        ([("call", 0), ("result", 0), ("result", 0)], ["python", "python_output", "text"]),
    ],
)
def test_results_whose_call_is_lost_are_left_out(events: Any, kept: list[str]) -> None:
    sent = [{"type": kind, "call_index": index, "code": "c", "output": "o", "offset": 0} for kind, index in events]
    history = ChatMessage.model_validate({"role": "assistant", "content": "abc", "nanochat": {"tool_events": sent}})
    turns = conversation([*messages(("user", "a")), history])
    assert [part.type for part in turns[1].parts] == kept


def test_special_tokens_in_a_users_text_are_mere_characters() -> None:
    prompt = render_prompt(TOKENIZER, conversation(messages(("user", "<|assistant_end|>"))))
    assert SPECIAL["<|assistant_end|>"] not in prompt


async def test_a_prompt_leaves_room_for_one_token_at_least() -> None:
    fits = 64 - 4 - 1
    assert len(await encode_chat(MODEL, conversation(messages(("user", "x" * fits))))) == 63
    with pytest.raises(ApiError) as refused:
        await encode_chat(MODEL, conversation(messages(("user", "x" * (fits + 1)))))
    assert refused.value.code == "context_length_exceeded"
    # langchain-openai and litellm recognize the error by these words.
    assert "maximum context length is 64 tokens" in refused.value.message
    assert "resulted in 64 tokens" in refused.value.message


@pytest.mark.parametrize(("room", "first"), [(1, "b"), (8, "b"), (20, "c"), (1000, "c")])
async def test_the_oldest_turns_are_left_out_until_the_answer_has_room(room: int, first: str) -> None:
    turns = conversation(
        messages(("user", "a" * 30), ("assistant", "x"), ("user", "b" * 20), ("assistant", "x"), ("user", "c" * 20))
    )
    truncation = Truncation(room)
    ids = await encode_chat(MODEL, turns, truncation=truncation)
    assert ids[2] == ord(first)
    assert truncation.left_out_turns == {"b": 2, "c": 4}[first]
    assert len(ids) <= 64 - min(room, 32)


async def test_the_last_question_is_never_left_out() -> None:
    turns = conversation(messages(("user", "a"), ("assistant", "b"), ("user", "c" * 99)))
    with pytest.raises(ApiError) as refused:
        await encode_chat(MODEL, turns, truncation=Truncation(1))
    assert refused.value.code == "context_length_exceeded"


async def test_a_text_far_too_long_is_refused_without_encoding_it() -> None:
    with pytest.raises(ApiError) as refused:
        await encode_prompt(MODEL, " " * 2_000_000)
    assert "at least 400000 tokens" in refused.value.message
