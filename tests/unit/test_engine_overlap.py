"""The device gets its next batch before the engine reads the last batch's tokens, if that changes no token.

``test_engine_exactness.py`` tests that tokens are the same with and without overlap.
"""

import itertools
from typing import Any

import pytest

from nanochat_core.engine import (
    Constraint,
    ConstraintKind,
    Engine,
    EngineConfig,
    FinishReason,
    Output,
    Request,
    SamplingParams,
    ToolOutput,
    ToolPolicy,
)
from nanochat_core.engine.sampler import Drawn
from nanochat_core.tokenizer import PYTHON_END, PYTHON_START
from tests.support.engine_models import BYTES, SPECIAL, script_tokens, scripted_model, tiny_model

OVERLAPPING = EngineConfig(overlap=True, speculative_tokens=0, kv_cache_bytes=1 << 26)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The order of events: the device begins a batch, or the tokens of a batch are read."""
    events: list[str] = []
    draw, read = Drawn.__init__, Drawn.read

    def noting_draw(self: Drawn, *args: Any) -> None:
        events.append("begin")
        draw(self, *args)

    def noting_read(self: Drawn) -> object:
        events.append("read")
        return read(self)

    monkeypatch.setattr(Drawn, "__init__", noting_draw)
    monkeypatch.setattr(Drawn, "read", noting_read)
    return events


def answer(engine: Engine, *requests: Request) -> list[Output]:
    for request in requests:
        engine.add(request)
    outputs: list[Output] = []
    for _ in itertools.repeat(None, 1000):
        outputs += engine.step()
        if not engine.progressed and not engine.load().parked:
            break
        engine.tools.wait()
    engine.check_integrity()
    assert engine.load().blocks_used == 0
    engine.close()
    return outputs


def test_a_batch_is_begun_before_the_last_one_is_read(order: list[str]) -> None:
    requests = [Request(str(i), (i, 1), SamplingParams(max_tokens=6, temperature=0.5 * i)) for i in range(3)]
    outputs = answer(Engine(tiny_model(), BYTES, OVERLAPPING), *requests)
    assert order == ["begin", *["begin", "read"] * 5, "read"]
    assert sum(len(output.tokens) for output in outputs) == 18


def test_without_overlap_each_batch_is_read_at_once(order: list[str]) -> None:
    config = EngineConfig(overlap=False, speculative_tokens=0, kv_cache_bytes=1 << 26)
    answer(Engine(tiny_model(), BYTES, config), Request("r", (1,), SamplingParams(max_tokens=4)))
    assert order == ["begin", "read"] * 4


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=4, frequency_penalty=0.5),
        SamplingParams(max_tokens=4, constraint=Constraint(ConstraintKind.REGEX, "[ab]{4}")),
    ],
    ids=["penalties", "constraint"],
)
def test_what_needs_the_last_tokens_waits_for_them(order: list[str], sampling: SamplingParams) -> None:
    answer(Engine(tiny_model(), BYTES, OVERLAPPING), Request("r", (1,), sampling))
    assert order[:4] == ["begin", "read"] * 2
    assert "".join(order).count("beginbegin") == 0


def test_drafts_are_made_of_known_tokens_and_until_there_is_one_batches_overlap(order: list[str]) -> None:
    """One model never repeats itself, and the other model repeats itself all the time."""
    config = EngineConfig(overlap=True, kv_cache_bytes=1 << 26)
    request = Request("r", tuple(script_tokens("a")), SamplingParams(max_tokens=24))
    outputs = answer(Engine(scripted_model("abcdefghijklmnopqrstuvwxyz"), BYTES, config), request)
    assert order == ["begin", *["begin", "read"] * 23, "read"]
    order.clear()
    repeated = answer(Engine(scripted_model("abc", loop=True), BYTES, config), request)
    assert len(order) < 40, "drafts save steps"
    assert order[-8:] == ["begin", "read"] * 4
    for tokens, text in ((outputs, "bcdefghijklmnopqrstuvwxy"), (repeated, "bca" * 8)):
        assert [token.id for output in tokens for token in output.tokens] == script_tokens(text[:24])


def test_nothing_that_was_computed_beyond_a_stop_token_is_told(order: list[str]) -> None:
    text = "abcd"
    stop = script_tokens("d")[0]
    sampling = SamplingParams(max_tokens=50, stop_token_ids=frozenset({stop}))
    outputs = answer(
        Engine(scripted_model(text), BYTES, OVERLAPPING), Request("r", tuple(script_tokens("a")), sampling)
    )
    assert [token.id for output in outputs for token in output.tokens] == script_tokens("bcd")
    assert [output.finish_reason for output in outputs if output.finish_reason] == [FinishReason.STOP]
    assert order.count("begin") == 4  # the tokens of the last batch are dropped


def test_a_call_in_flight_drops_what_was_computed_beyond_it(order: list[str]) -> None:
    """The text after the call continues the call's output. The token that was computed in the meantime is dropped."""

    async def run(_code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
        return ToolOutput("ok", "")

    model = scripted_model(f"a{PYTHON_START}1{PYTHON_END}<|output_start|><|output_end|>z")
    engine = Engine(model, BYTES, OVERLAPPING, tool_runner=run)
    request = Request("r", tuple(script_tokens("a")), SamplingParams(max_tokens=6), tools=ToolPolicy(True))
    tokens = [token for output in answer(engine, request) for token in output.tokens]
    assert [token.id for token in tokens] == script_tokens(
        f"{PYTHON_START}1{PYTHON_END}<|output_start|><|output_end|>z"
    )
    assert [token.forced for token in tokens] == [False] * 3 + [True] * 2 + [False]
    assert SPECIAL[PYTHON_END] in {token.id for token in tokens}


def test_a_request_cancelled_in_flight_is_never_heard_of_again() -> None:
    engine = Engine(tiny_model(), BYTES, OVERLAPPING)
    engine.add(Request("gone", (1, 2), SamplingParams(max_tokens=50)))
    engine.add(Request("stays", (2, 2), SamplingParams(max_tokens=5)))
    for _ in range(3):
        engine.step()
    engine.cancel("gone")
    engine.add(Request("gone", (3,), SamplingParams(max_tokens=2)))
    outputs = answer(engine)
    again = [output for output in outputs if output.request_id == "gone"]
    assert sum(len(output.tokens) for output in again) == 2


def test_the_last_token_that_fits_is_not_overtaken(order: list[str]) -> None:
    """No batch follows if the token in flight completes the sequence."""
    answer(Engine(tiny_model(), BYTES, OVERLAPPING), Request("r", (1,), SamplingParams(max_tokens=1)))
    assert order == ["begin", "read"]
