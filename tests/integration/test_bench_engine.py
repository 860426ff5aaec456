"""The inference benchmark measures the core, an engine process and a gateway. It reports servers that fail."""

import asyncio
import contextlib
import http.server
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from jobs.eval.bench.roofline import Limits
from jobs.eval.bench_engine import BenchEngineSettings, run
from nanochat_core.checkpoint import CheckpointRef, promote
from nanochat_core.errors import UserError
from nanochat_core.protos import engine_pb2 as pb
from nanochat_core.store import open_store
from nanochat_core.training.checkpoint_writer import save_checkpoint
from tests.support.engine_models import BYTES, tiny_model
from tests.support.scripted_engine import failing, hanging, running_engine, running_gateway, saying, until_ready
from tests.support.service_process import EngineProcess

SMALL: dict[str, Any] = {
    "batch_sizes": ("2", "4"),
    "prompt_tokens": 40,
    "output_tokens": 6,
    "mixed_prompts": "5-30",
    "mixed_outputs": "2-8",
    "shared_tokens": 32,
    "samples": 2,
    "requests": 4,
    "timeout_seconds": 60.0,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    store, ref = open_store(str(home)), CheckpointRef("tiny", "sft", 1)
    save_checkpoint(store, ref, model=tiny_model(context_length=512), tokenizer=BYTES, meta={})
    promote(store, ref)
    return home


@pytest.fixture(scope="module")
def service(home: Path) -> Iterator[EngineProcess]:
    running = EngineProcess(home, "--max-running", "4", "--max-waiting", "8")
    yield running
    assert running.stop() == 0


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> Limits:
    """Replaces the machine's limits by fixed numbers, because measuring takes seconds. One test measures them."""
    made = Limits(bytes_per_second=1e15, flops_per_second=1e15)
    monkeypatch.setattr("jobs.eval.bench_engine.measure_limits", lambda _device, _dtype: made)
    return made


def bench(folder: Path, **changes: Any) -> tuple[dict[str, Any], list[str]]:
    """Run the benchmark, and return its result and the lines that it shows."""
    lines: list[str] = []
    result = run(BenchEngineSettings(**{**SMALL, "output": str(folder), "threads": 1, **changes}), lines.append)
    return result, lines


def output_tokens(mix: str, requests: int, choices: int = 1) -> int:
    return requests * SMALL["output_tokens"] * (choices if mix == "samples" else 1)


def test_the_core_is_measured_in_every_mix_and_size(tmp_path: Path) -> None:
    result, lines = bench(tmp_path, depth=1, head_dim=16, vocab_size=300, context_length=128)
    assert [(row["mix"], row["slots"]) for row in result["rows"]] == [
        (mix, slots) for mix in ("fixed", "mixed", "samples", "prefix") for slots in (2, 4)
    ]
    for row in result["rows"]:
        assert (row["answered"], row["refused"], row["failed"]) == (4, 0, 0)
        if row["mix"] != "mixed":
            assert row["output_tokens"] == output_tokens(row["mix"], 4, 2)
        assert row["tokens_per_second"] == pytest.approx(row["output_tokens"] / row["seconds"])
        assert 0 < row["time_to_first_token"][0] <= row["time_to_first_token"][1] < row["seconds"]
        assert 0 < row["bandwidth_share"] < 1
        assert 0 < row["flops_share"] < 1
    by_mix = {row["mix"]: row for row in result["rows"]}
    assert by_mix["fixed"]["cached_share"] == 0
    # Three of 4 prompts find 32 of their 40 tokens in the cache. The second choice finds all tokens but the last.
    assert by_mix["prefix"]["cached_share"] == pytest.approx(3 * 32 / (4 * 40))
    assert by_mix["samples"]["cached_share"] == pytest.approx(39 / (2 * 40))
    assert len(lines) == 1 + 1 + 8
    assert json.loads((tmp_path / "bench.json").read_bytes()) == json.loads(json.dumps(result))
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_prefix_cache_nothing_is_found_in_it(tmp_path: Path) -> None:
    result, _ = bench(tmp_path, depth=1, head_dim=16, vocab_size=300, prefix_caching=False, mixes=("prefix",))
    assert [row["cached_share"] for row in result["rows"]] == [0, 0]


def test_shares_are_what_was_read_and_computed_over_what_could_have_been(tmp_path: Path, limits: Limits) -> None:
    result, _ = bench(
        tmp_path,
        depth=1,
        head_dim=64,
        vocab_size=320,
        batch_sizes=("1",),
        requests=1,
        mixes=("fixed",),
    )
    (row,) = result["rows"]
    matrices = 12 * 64 * 64
    head = 64 * 320
    # The first step computes the prompt, and the last token of the prompt sees 40 keys. Each later step computes one
    # token.
    read = 4 * (6 * (matrices + head) + sum(2 * 64 * keys for keys in range(40, 46)))
    computed = 2 * (45 * matrices + 6 * head) + sum(4 * 64 * keys for keys in range(1, 46))
    assert row["flops_share"] / row["bandwidth_share"] == pytest.approx(computed / read)
    # The steps together take at most as long as the whole run.
    assert row["bandwidth_share"] >= read / row["seconds"] / limits.bytes_per_second


def test_a_checkpoint_is_measured_and_the_result_goes_into_its_store(home: Path) -> None:
    result, lines = bench(home, model="tiny", home=str(home), output="", report="speed", mixes=("mixed",))
    assert result["target"]["revision"] == "sft/step_000001"
    assert (result["target"]["device"], result["target"]["dtype"]) == ("cpu", "float32")
    assert json.loads(open_store(str(home)).read("reports/speed/bench.json"))["rows"] == json.loads(
        json.dumps(result["rows"])
    )
    assert (home / "reports" / "speed" / "bench.png").is_file()
    assert lines[0].startswith("limits: ")


def test_arrivals_at_random_are_sent_at_their_rate(home: Path, tmp_path: Path) -> None:
    result, lines = bench(tmp_path, model="tiny", home=str(home), rate=("200", "400"), mixes=("mixed",), requests=20)
    assert [(row["slots"], row["rate"], row["answered"]) for row in result["rows"]] == [
        (None, 200, 20),
        (None, 400, 20),
    ]
    assert "400/s" in lines[-1]


def test_an_engine_process_gives_outputs_of_the_wanted_length(service: EngineProcess, tmp_path: Path) -> None:
    result, _ = bench(tmp_path, endpoint=f"grpc://{service.address}")
    assert (result["target"]["model"], result["limits"]) == ("tiny", None)
    for row in result["rows"]:
        assert (row["answered"], row["errors"]) == (4, {})
        if row["mix"] != "mixed":
            assert row["output_tokens"] == output_tokens(row["mix"], 4, 2)
            assert row["prompt_tokens"] == 40 * 4 * (2 if row["mix"] == "samples" else 1)
        assert row["bandwidth_share"] is None
    by_mix = {row["mix"]: row for row in result["rows"]}
    assert by_mix["fixed"]["cached_share"] == 0
    assert by_mix["prefix"]["cached_share"] > 0.5


def test_a_second_run_does_not_find_the_prompts_of_the_first_in_the_cache(
    service: EngineProcess, tmp_path: Path
) -> None:
    for _ in range(2):
        result, _ = bench(tmp_path, endpoint=f"grpc://{service.address}", mixes=("fixed",))
        assert [row["cached_share"] for row in result["rows"]] == [0, 0]


def test_an_engine_that_has_no_room_refuses_and_that_is_counted(service: EngineProcess, tmp_path: Path) -> None:
    changes = {"mixes": ("fixed",), "rate": ("100000",), "requests": 40, "output_tokens": 400}
    result, lines = bench(tmp_path, endpoint=f"grpc://{service.address}", **changes)
    (row,) = result["rows"]
    assert row["answered"] >= 12  # at least 4 requests run and 8 wait
    assert row["answered"] + row["refused"] == 40
    assert row["refused"] > 0
    assert row["errors"] == {"RESOURCE_EXHAUSTED": row["refused"]}
    assert row["output_tokens"] == 400 * row["answered"]
    assert str(row["refused"]) in lines[-1]


async def test_a_gateway_before_an_engine_process_is_measured(service: EngineProcess, tmp_path: Path) -> None:
    async with running_gateway(service.address) as url:
        await until_ready(url)
        result, _ = await asyncio.to_thread(
            bench, tmp_path, endpoint=f"{url}/v1", prompt_tokens=120, shared_tokens=80, mixed_prompts="60-120"
        )
    assert result["target"] == {"model": "tiny"}
    for row in result["rows"]:
        assert (row["answered"], row["errors"]) == (4, {})
        assert row["output_tokens"] <= 8 * 8
        assert row["requests_per_second"] > 0
    # The tokenizer's tokens are single bytes, so these lengths are right only if the client has measured the tokens per
    # word.
    fixed = result["rows"][0]
    assert 80 <= fixed["prompt_tokens"] / 4 <= 160
    assert {row["mix"]: row for row in result["rows"]}["prefix"]["cached_share"] > 0.2


@pytest.mark.parametrize(
    ("script", "errors", "refused", "timeout"),
    [
        (failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "full"), {"RESOURCE_EXHAUSTED": 4}, 4, 60.0),
        (failing(grpc.StatusCode.INTERNAL, "broken", after=saying("hello")), {"INTERNAL": 4}, 0, 60.0),
        (hanging("hello"), {"no end after 4 seconds": 4}, 0, 4.0),
    ],
    ids=["full", "in mid-stream", "silent"],
)
async def test_engines_that_fail_are_told_apart(
    script: Any, errors: Any, refused: int, timeout: float, tmp_path: Path
) -> None:
    async with running_engine() as engine:
        good = saying(*["hello"] * 3)
        asked = 0

        async def script_or_good(request: Any, context: Any) -> AsyncIterator[pb.GenerateChunk]:
            nonlocal asked
            asked += 1
            # Answer the warm-up (2 requests) and the 4 requests of the first row, and the warm-up of the second row.
            async for part in (good if asked <= 2 + 4 + 2 else script)(request, context):
                yield part

        engine.script = script_or_good
        result, _ = await asyncio.to_thread(
            bench,
            tmp_path,
            endpoint=f"grpc://{engine.address}",
            mixes=("fixed",),
            batch_sizes=("2", "2"),
            timeout_seconds=timeout,
        )
    answered, failed = result["rows"]
    assert (answered["answered"], answered["errors"]) == (4, {})
    assert failed["errors"] == errors
    assert (failed["answered"], failed["refused"], failed["failed"]) == (0, refused, 4 - refused)
    assert failed["output_tokens"] == 0
    assert failed["time_to_first_token"] is None


KEY = "key-4711"
ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
TEXT = {"choices": [{"index": 0, "delta": {"content": "word "}, "finish_reason": None}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": 3}}
WHOLE = [ROLE, TEXT, TEXT, USAGE, None]


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Streams a list of events to clients that send the key. ``None`` in the list stands for the end mark.

    If ``events`` returns an integer instead of a list, the answer is an error with this HTTP status.
    """

    events: Callable[[int], list[Any] | int]
    asked: list[dict[str, Any]]
    counting = threading.Lock()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.counting:  # each request runs in a thread of its own
            self.asked.append(body)
            number = len(self.asked)
        events = self.events(number)
        if self.headers["authorization"] != f"Bearer {KEY}":
            events = 401
        if isinstance(events, int):
            self.send_response(events)
            self.end_headers()
            self.wfile.write(b"{}")
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b": a comment\n\n")
        for event in events:
            self.wfile.write(b"data: " + (b"[DONE]" if event is None else json.dumps(event).encode()) + b"\n\n")

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "some-model"}]}')

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def endpoint(events: Callable[[int], list[Any] | int]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An endpoint's URL, and the list of the requests that it receives."""
    asked: list[dict[str, Any]] = []
    handler = type("Handler", (Endpoint,), {"events": staticmethod(events), "asked": asked})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_any_endpoint_of_openais_form_is_measured_and_its_key_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with endpoint(lambda _: WHOLE) as (url, asked):
        result, lines = bench(tmp_path, endpoint=url, api_key_variable="SOME_KEY", mixes=("samples",))
    assert result["target"] == {"model": "some-model"}
    row = result["rows"][0]
    assert (row["answered"], row["prompt_tokens"], row["output_tokens"], row["cached_share"]) == (4, 80, 12, None)
    assert asked[-1]["model"] == "some-model"
    assert (asked[-1]["n"], asked[-1]["temperature"], asked[-1]["max_tokens"]) == (2, 1.0, 6)
    everything = "".join([*lines, caplog.text, *(path.read_text() for path in tmp_path.glob("*.json"))])
    assert "SOME_KEY" in everything
    assert KEY not in everything


@pytest.mark.parametrize(
    ("events", "error", "refused"),
    [
        (429, "HTTP status 429", True),
        (500, "HTTP status 500", False),
        ([ROLE, TEXT], "the stream ended early", False),
        ([ROLE, TEXT, {"error": {"message": "no"}}], "an error in mid-stream", False),
        ([ROLE, TEXT, None], "the stream has no usage (stream_options.include_usage)", False),
        ([{"choices": [{"index": 0}]}, USAGE, None], "the answer is not of the form of chat completions", False),
    ],
)
def test_endpoints_that_fail_are_told_apart(
    events: Any, error: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    warm = 2 + 2  # two requests that measure tokens per word, and two warm-up requests
    with endpoint(lambda number: WHOLE if number <= warm or number % 2 else events) as (url, _):
        changes = {"model": "m", "mixes": ("fixed",), "batch_sizes": ("2",)}
        result, _ = bench(tmp_path, endpoint=url, api_key_variable="SOME_KEY", **changes)
    (row,) = result["rows"]
    assert row["errors"] == {error: 2}
    assert (row["answered"], row["refused"], row["failed"]) == (2, 2 if refused else 0, 0 if refused else 2)
    assert row["output_tokens"] == 6


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"endpoint": "grpc://127.0.0.1:1"}, "no engine answers at grpc://127.0.0.1:1 (UNAVAILABLE"),
        ({"endpoint": "http://127.0.0.1:1/v1"}, "http://127.0.0.1:1/v1 cannot be measured: ConnectError"),
        ({"endpoint": "ftp://host/v1"}, "--endpoint is 'ftp://host/v1'; use http://host:port/v1 or grpc://host:port"),
        ({"endpoint": "http://[::1"}, "--endpoint is not a URL (Invalid IPv6 URL); use http://host:port/v1 or grpc://"),
        (
            {"endpoint": "grpc://host:99999"},
            "--endpoint is not a URL (Port out of range 0-65535); use http://host:port",
        ),
        ({"endpoint": "http://host:port/v1"}, "--endpoint is not a URL (Port could not be cast to integer value as"),
        ({"endpoint": "http://[::1]x/v1"}, "--endpoint is not a URL (Invalid port: 'x'); use http://host:port/v1"),
        ({"endpoint": "http://me:secret@host/v1"}, "--endpoint has a user or password in it"),
        ({"endpoint": "http://h/v1", "api_key_variable": "NOT_SET"}, "--api-key-variable names NOT_SET, which is not"),
        ({"depth": 1, "context_length": 20}, "prompts and outputs reach 46 tokens, but the context length is 20"),
        ({"model": "missing"}, "model 'missing' has no sft checkpoint"),
        ({"depth": 1, "output": "", "report": "../x"}, "'reports/../x' is no key of the store"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is(changes: Any, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        bench(tmp_path, **{"home": str(tmp_path / "home"), **changes})
    assert complaint in str(refused.value)
    assert "secret" not in str(refused.value)


def test_an_endpoint_that_wants_another_key_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "key-of-another")
    with endpoint(lambda _: WHOLE) as (url, _), pytest.raises(UserError) as refused:
        bench(tmp_path, endpoint=url, api_key_variable="SOME_KEY")
    assert str(refused.value) == f"{url} cannot be measured: HTTP status 401"


def test_if_nothing_is_answered_that_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    with endpoint(lambda number: WHOLE if number <= 2 else 500) as (url, _), pytest.raises(UserError) as refused:
        bench(tmp_path, endpoint=url, api_key_variable="SOME_KEY")
    assert str(refused.value) == "no request was answered: HTTP status 500"
    assert not list(tmp_path.iterdir())


def test_the_limits_of_this_machine_are_those_of_its_best_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("jobs.eval.bench.roofline.MATRIX_SIDE", {"cpu": 256})
    monkeypatch.setattr("jobs.eval.bench.roofline.COPIED_BYTES", {"cpu": 1 << 22})
    monkeypatch.setattr("jobs.eval.bench.roofline.MEASURED_SECONDS", 0.0)
    taken = iter([4.0, 2.0, 3.0, 1.0, 5.0, 6.0, 0.5, 0.25, 0.75])
    clock = [0.0]

    def now() -> float:
        clock[0] += next(taken) if now.ticking else 0.0  # type: ignore[attr-defined]
        now.ticking = not now.ticking  # type: ignore[attr-defined]
        return clock[0]

    now.ticking = False  # type: ignore[attr-defined]
    monkeypatch.setattr("jobs.eval.bench.roofline.time.perf_counter", now)
    from jobs.eval.bench.roofline import measure_limits

    limits = measure_limits(torch.device("cpu"), torch.float32)
    # The fastest copy takes 2 seconds and counts twice, because it reads and writes. The fastest sum takes 1 second,
    # and the fastest product takes 0.25 seconds.
    assert limits.bytes_per_second == max(2 * 2**22 / 2, 2**22 / 1)
    assert limits.flops_per_second == 2 * 256**3 / 0.25
