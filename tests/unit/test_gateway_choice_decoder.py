"""The decoder's text, tool events and log probabilities don't depend on how the engine groups its tokens."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_core.protos import engine_pb2 as pb
from nanochat_core.tokenizer import Tokenizer
from services.gateway.answer.choice_decoder import ChoiceDecoder, Delta
from services.gateway.answer.logprobs import chat_logprobs, completion_logprobs
from services.gateway.engines.said import Said

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)] + [b"he", b"ll", b"hell", b"hello", b" \xf0\x9f"])
SPECIAL = TOKENIZER.special_ids


def tokens(*parts: str | bytes) -> list[int]:
    """Returns the token ids of texts, bytes and special tokens; a special token is given by its name."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, bytes):
            ids += list(part)
        else:
            ids += [SPECIAL[part]] if part in SPECIAL else TOKENIZER.encode(part)
    return ids


def call(index: int, code: str) -> pb.ToolEvent:
    return pb.ToolEvent(call=pb.ToolCall(call_index=index, code=code))


def result(index: int, output: str) -> pb.ToolEvent:
    return pb.ToolEvent(result=pb.ToolResult(call_index=index, status="ok", output=output, duration_seconds=0.002))


def run(chunks: list[pb.GenerateChunk], stops: list[str] | None = None, *, raw: bool = False) -> list[Delta]:
    choice = ChoiceDecoder(TOKENIZER, stops or [], raw=raw)
    return [choice.feed(chunk) for chunk in chunks]


def merged(deltas: list[Delta]) -> Delta:
    whole = Delta()
    for delta in deltas:
        whole.text += delta.text
        whole.tokens += delta.tokens
        whole.offsets += delta.offsets
        whole.tool_events += delta.tool_events
        whole.finish_reason = delta.finish_reason or whole.finish_reason
    return whole


def chunk(ids: list[int], *events: pb.ToolEvent, finish: str | None = None, logprobs: bool = False) -> pb.GenerateChunk:
    made = [pb.Token(id=i, logprob=-i / 100 if logprobs else None) for i in ids]
    reason = {None: 0, "stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}[finish]
    return pb.GenerateChunk(tokens=made, tool_events=events, finish_reason=reason)


def one_by_one(ids: list[int], finish: str = "stop", **options: bool) -> list[pb.GenerateChunk]:
    return [*(chunk([i], **options) for i in ids[:-1]), chunk(ids[-1:], finish=finish, **options)]


def test_a_character_of_several_tokens_comes_whole() -> None:
    deltas = run(one_by_one(tokens("a", "😀".encode(), "b")))
    assert [delta.text for delta in deltas if delta.text] == ["a", "😀", "b"]


def test_bytes_that_never_become_a_character_are_replaced_at_the_end() -> None:
    assert merged(run(one_by_one(tokens("a", b"\xf0\x9f"), "length"))).text == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("last", ["<|assistant_end|>", "<|bos|>"])
def test_the_stop_token_is_never_shown(last: str) -> None:
    whole = merged(run(one_by_one(tokens("hello", last))))
    assert (whole.text, whole.finish_reason) == ("hello", "stop")


def test_code_and_output_are_events_and_not_text() -> None:
    deltas = run(
        [
            chunk(tokens("é: ", "<|python_start|>", "1+1", "<|python_end|>"), call(0, "1+1")),
            chunk([], result(0, "2")),
            chunk(tokens("<|output_start|>", "2", "<|output_end|>")),
            chunk(tokens("2!", "<|assistant_end|>"), finish="stop"),
        ]
    )
    assert merged(deltas).text == "é: 2!"
    assert deltas[0].tool_events == [{"index": 0, "type": "call", "call_index": 0, "code": "1+1", "offset": 3}]
    assert deltas[1].tool_events == [
        {"index": 1, "type": "result", "call_index": 0, "status": "ok", "output": "2", "duration_seconds": 0.002}
    ]


def test_two_calls_in_one_chunk_keep_their_own_offsets() -> None:
    ids = tokens("a", "<|python_start|>", "1", "<|python_end|>", "<|output_start|>", "1", "<|output_end|>")
    ids += tokens("bc", "<|python_start|>", "2", "<|python_end|>", "<|output_start|>", "2", "<|output_end|>", "d")
    whole = merged(run([chunk(ids, call(0, "1"), result(0, "1"), call(1, "2"), result(1, "2"), finish="stop")]))
    assert whole.text == "abcd"
    assert [event["offset"] for event in whole.tool_events if event["type"] == "call"] == [1, 3]


def test_a_call_waits_for_held_text_before_it() -> None:
    choice = ChoiceDecoder(TOKENIZER, ["STOP"])
    first = choice.feed(chunk(tokens("aST", "<|python_start|>", "1", "<|python_end|>"), call(0, "1")))
    assert (first.text, first.tool_events) == ("a", [])
    second = choice.feed(chunk(tokens("x")))
    assert (second.text, second.tool_events[0]["offset"]) == ("STx", 3)


def test_a_call_after_the_beginning_of_a_stop_string_is_never_seen() -> None:
    choice = ChoiceDecoder(TOKENIZER, ["STOP"])
    assert choice.feed(chunk(tokens("aST", "<|python_start|>", "1", "<|python_end|>"), call(0, "1"))).text == "a"
    last = choice.feed(chunk(tokens("OP and more")))
    assert (last.text, last.tool_events, last.finish_reason) == ("", [], "stop")


def test_a_stop_string_counts_the_tokens_up_to_its_end() -> None:
    choice = ChoiceDecoder(TOKENIZER, ["l"])
    delta = choice.feed(chunk(list(b"hello there")))
    assert (delta.text, delta.finish_reason, choice.token_count) == ("he", "stop", 3)
    assert not choice.feed(chunk(tokens("x"), finish="length"))


def test_held_text_is_shown_when_the_answer_ends() -> None:
    whole = merged(run(one_by_one(tokens("aST", "<|assistant_end|>")), ["STOP"]))
    assert (whole.text, whole.finish_reason) == ("aST", "stop")


def test_raw_text_has_no_hidden_parts() -> None:
    ids = tokens("a", "<|python_start|>", "b", "<|python_end|>", "c")
    assert merged(run(one_by_one(ids), raw=True)).text == "abc"


@given(
    text=st.text(alphabet="hel o😀é", max_size=25),
    later=st.text(alphabet="hel o😀é", max_size=10),
    stops=st.lists(st.text(alphabet="hel😀", min_size=1, max_size=4), max_size=3),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=40),
)
@settings(deadline=None)
def test_the_grouping_of_tokens_changes_nothing(text: Any, later: Any, stops: Any, sizes: Any) -> None:
    before = tokens(text, "<|python_start|>", "7", "<|python_end|>")
    after = tokens("<|output_start|>", "7", "<|output_end|>", later, "<|assistant_end|>")

    def grouped(ids: list[int]) -> list[list[int]]:
        groups, rest = [], ids
        for size in [*sizes, len(ids)]:
            groups.append(rest[:size])
            rest = rest[size:]
        return [group for group in groups if group]

    chunks = [chunk(group, logprobs=True) for group in grouped(before)]
    chunks[-1].tool_events.append(call(0, "7"))
    chunks.append(chunk([], result(0, "7")))
    chunks += [chunk(group, logprobs=True) for group in grouped(after)]
    chunks[-1].finish_reason = pb.FINISH_REASON_STOP

    deltas = run(chunks, stops)
    whole = merged(deltas)
    single = [
        chunk(before, call(0, "7"), logprobs=True),
        chunk([], result(0, "7")),
        chunk(after, finish="stop", logprobs=True),
    ]
    assert dataclasses.asdict(whole) == dataclasses.asdict(merged(run(single, stops)))

    # The stop strings match the text alone, with or without tool calls in it.
    full = text + later
    ends = [(full.find(stop) + len(stop), full.find(stop)) for stop in stops if stop in full]
    assert whole.text == full[: min(ends)[1]] if ends else whole.text == full
    # The client sees a call only after all the text before the call. If a stop string cuts this text off, the client
    # never sees the call.
    length = 0
    for delta in deltas:
        length += len(delta.text)
        assert all(event.get("offset", 0) <= length for event in delta.tool_events)
    assert bool(whole.tool_events) == (len(text) <= len(whole.text))


def test_log_probabilities_cover_the_text_and_nothing_else() -> None:
    ids = tokens("hello 😀", "<|python_start|>", "1", "<|python_end|>", "!", "<|assistant_end|>")
    whole = merged(run(one_by_one(ids, logprobs=True)))
    shown = chat_logprobs(TOKENIZER, whole.tokens)["content"]
    assert bytes(byte for entry in shown for byte in entry["bytes"]).decode() == whole.text == "hello 😀!"
    assert shown[0]["token"] == "hello"
    assert shown[0]["logprob"] == pytest.approx(-2.59)


def test_raw_text_has_the_log_probability_of_a_last_special_token() -> None:
    ids = tokens("hello", "<|bos|>")
    assert [token.id for token in merged(run(one_by_one(ids, logprobs=True), raw=True)).tokens] == ids
    assert [token.id for token in merged(run(one_by_one(ids, logprobs=True))).tokens] == ids[:1]


def test_of_alternatives_with_equal_text_the_likeliest_counts() -> None:
    top = [pb.TopLogprob(token_id=0xF0, logprob=-1.0), pb.TopLogprob(token_id=0x9F, logprob=-2.0)]
    found = completion_logprobs(TOKENIZER, [pb.Token(id=97, logprob=-0.5, top_logprobs=top)], [0])
    assert found["top_logprobs"] == [{"\N{REPLACEMENT CHARACTER}": -1.0}]


def test_log_probabilities_end_with_the_text_before_a_stop_string() -> None:
    whole = merged(run(one_by_one(list(b"abSTOPcd"), logprobs=True), ["STOP"]))
    assert bytes(token.id for token in whole.tokens) == b"ab"
    assert whole.offsets == [0, 1]


def test_an_impossible_token_has_a_logprob_that_json_can_carry() -> None:
    token = pb.Token(id=97, logprob=0.0, top_logprobs=[pb.TopLogprob(token_id=98, logprob=float("-inf"))])
    assert chat_logprobs(TOKENIZER, [token])["content"][0]["top_logprobs"][0]["logprob"] == -9999.0
    assert completion_logprobs(TOKENIZER, [token], [0])["top_logprobs"] == [{"b": -9999.0}]


def test_a_special_token_among_the_alternatives_has_a_name_and_no_bytes() -> None:
    top = pb.TopLogprob(token_id=SPECIAL["<|assistant_end|>"], logprob=-1.0)
    entry = chat_logprobs(TOKENIZER, [pb.Token(id=97, logprob=-0.5, top_logprobs=[top])])["content"][0]
    assert entry["top_logprobs"] == [{"token": "<|assistant_end|>", "logprob": -1.0, "bytes": None}]


def test_pictures_are_shown_in_base64_and_not_kept_for_another_engine() -> None:
    event = result(0, "42")
    event.result.pictures.add(name="figure-1.png", media_type="image/png", content=b"pixels")
    came = chunk(tokens("<|output_start|>", "42", "<|output_end|>"), event)
    shown = merged(run([chunk(tokens("<|python_start|>", "1", "<|python_end|>"), call(0, "1")), came])).tool_events
    assert shown[1]["pictures"] == [{"name": "figure-1.png", "media_type": "image/png", "data": "cGl4ZWxz"}]
    said = Said()
    said.add(came)
    assert said.tool_events == [result(0, "42")]
    assert len(event.result.pictures) == 1
