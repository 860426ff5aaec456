"""A request's messages become the turns that the model knows, and the turns become token ids."""

from typing import Any

import pytest

from nanochat_core.chat import AssistantStream, render_prompt
from nanochat_core.protos import engine_pb2
from nanochat_core.tokenizer import Tokenizer
from services.gateway.engines.model import ServedModel
from services.gateway.engines.request import conversation, encode_chat, encode_text
from services.gateway.errors import ApiError
from services.gateway.schemas import ChatMessage

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
    ) == [("user", "A\n\nB\n\nC"), ("assistant", "D"), ("user", "E\n\nF\n\nG")]


def test_text_parts_are_joined_by_line_breaks() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert texts(("user", parts)) == [("user", "one\ntwo")]


@pytest.mark.parametrize(
    ("roles", "param"),
    [
        (["assistant", "user"], "messages[0].role"),
        (["system", "assistant", "user"], "messages[1].role"),
        (["user", "assistant", "assistant", "user"], "messages[2].role"),
        (["user", "assistant"], "messages"),
        (["system"], "messages"),
    ],
)
def test_turns_that_the_format_has_no_place_for_are_refused(roles: list[str], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        conversation(messages(*((role, "x") for role in roles)))
    assert (refused.value.status_code, refused.value.param) == (400, param)


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
        ([("result", 0, 0)], "tool_events[0].call_index"),
        ([("call", 0, 0), ("result", 1, 0)], "tool_events[1].call_index"),
        ([("call", 0, 0), ("result", 0, 0), ("result", 0, 0)], "tool_events[2].call_index"),
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


def test_special_tokens_in_a_users_text_are_mere_characters() -> None:
    prompt = render_prompt(TOKENIZER, conversation(messages(("user", "<|assistant_end|>"))))
    assert SPECIAL["<|assistant_end|>"] not in prompt


async def test_a_prompt_leaves_room_for_one_token_at_least() -> None:
    fits = 64 - 4 - 1
    assert len(await encode_chat(MODEL, conversation(messages(("user", "x" * fits))))) == 63
    with pytest.raises(ApiError) as refused:
        await encode_chat(MODEL, conversation(messages(("user", "x" * (fits + 1)))))
    assert refused.value.code == "context_length_exceeded"
    assert "64 tokens, answer included, and this request has 64 tokens" in refused.value.message


async def test_a_text_far_too_long_is_refused_without_encoding_it() -> None:
    with pytest.raises(ApiError) as refused:
        await encode_text(MODEL, " " * 2_000_000, bos=True)
    assert "at least 400000 tokens" in refused.value.message
