"""Measure the speed of inference under load: ``python -m jobs.eval.bench_engine --depth 4``."""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import re
import secrets
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx

from jobs.eval.bench.core_client import CoreClient
from jobs.eval.bench.models import random_model, random_tokenizer
from jobs.eval.bench.network_clients import GrpcClient, HttpClient, NetworkClient
from jobs.eval.bench.request_results import summarize
from jobs.eval.bench.roofline import Limits, least_costs, measure_limits
from jobs.eval.bench.rows import HEADER, RESULT_FORMAT, Row, plot_benchmark, table_line
from jobs.eval.bench.workload import (
    MIXES,
    BenchRequest,
    Load,
    Shape,
    choices_per_request,
    make_requests,
    poisson_arrivals,
)
from jobs.measures.machine import describe_machine
from jobs.program import JobSettings, make_output_folder, run_program
from nanochat_core.checkpoint import pick_checkpoint
from nanochat_core.config import ModelConfig
from nanochat_core.device import choose_device, choose_dtype, prepare_cpu
from nanochat_core.engine import Engine, EngineConfig
from nanochat_core.errors import UserError
from nanochat_core.formats import with_format
from nanochat_core.model import GPT
from nanochat_core.settings import describe, setting
from nanochat_core.store import Lease, open_store
from nanochat_core.tokenizer import Tokenizer

log = logging.getLogger("jobs.eval.bench_engine")

# Default numbers of requests for a row of the table: with --batch-sizes, _ROUNDS times the number of requests that run
# at the same time; with --rate, _ARRIVALS.
_ROUNDS, _ARRIVALS = 4, 64
# Before a row of the table is measured, warm-up requests with this number of output tokens are sent: as many as run at
# a time, or one with --rate.
_WARM_UP_OUTPUT = 4

Client = CoreClient | NetworkClient


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchEngineSettings(JobSettings):
    """Measure latency and throughput of the inference core, an engine service or any OpenAI-compatible endpoint."""

    model: str = setting("", "model of the store to load; with an http endpoint, the model to ask for")
    revision: str = setting("", "<stage>/step_<n> or promoted; empty for the model's newest SFT checkpoint")
    depth: int = setting(0, "depth of a model with random weights, instead of a model of the store", minimum=0)
    endpoint: str = setting("", "http://host:port/v1 or grpc://host:port to measure instead of the core")
    batch_sizes: tuple[str, ...] = setting(
        ("1", "8", "32", "64"),
        "numbers of sequences that run at the same time; the table has a row for each mix and number",
    )
    rate: tuple[str, ...] = setting((), "rates of a Poisson process, in requests per second, instead of --batch-sizes")
    mixes: tuple[str, ...] = setting(MIXES, "kinds of requests")
    prompt_tokens: int = setting(128, "tokens in each prompt, except in the mix mixed", minimum=1)
    output_tokens: int = setting(128, "tokens in each output, except in the mix mixed", minimum=1)
    mixed_prompts: str = setting("10-200", "tokens in the shortest and the longest prompt of the mix mixed")
    mixed_outputs: str = setting("10-120", "tokens in the shortest and the longest output of the mix mixed")
    shared_tokens: int = setting(96, "number of first tokens that all prompts of the mix prefix share", minimum=1)
    samples: int = setting(8, "largest number of continuations of a prompt in the mix samples", minimum=1)
    requests: int = setting(
        0,
        "requests per row of the table, never fewer than run at a time; 0 sends 4 times as many, or 64 with --rate",
        minimum=0,
    )
    seed: int = setting(
        0, "seed of lengths and arrival times; without --endpoint, also of prompts and random weights", minimum=0
    )
    timeout_seconds: float = setting(600.0, "seconds after which an endpoint's request has failed", minimum=0.001)
    api_key_variable: str = setting("", "environment variable with the endpoint's API key; empty sends none")
    head_dim: int = setting(64, "head dimension of a model with random weights", minimum=2)
    vocab_size: int = setting(4096, "vocabulary size of a model with random weights", minimum=265)
    context_length: int = setting(1024, "context length of a model with random weights, in tokens", minimum=1)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "device of the core")
    dtype: Literal["auto", "fp32", "bf16"] = setting("auto", "dtype of the core; auto is fp32 on CPUs")
    threads: int = setting(0, "CPU threads of the core; 0 leaves the choice to torch", minimum=0, maximum=4096)
    kv_cache_mib: int = setting(0, "size of the core's KV cache in MiB; 0 lets the engine choose", minimum=0)
    prefix_caching: bool = setting(True, "reuse KV blocks that other requests have computed")
    report: str = setting("engine", "name of the folder under the store's reports/ for bench.json and bench.png")
    output: str = setting("", "local folder for bench.json and bench.png, instead of the store")

    def __post_init__(self) -> None:
        if not self.endpoint and bool(self.model) == bool(self.depth):
            raise UserError("give one of --model, --depth and --endpoint: the benchmark measures one of them")
        if self.endpoint and self.depth:
            raise UserError("--depth makes a model in this process; leave it out with --endpoint")
        if self.revision and (self.endpoint or self.depth):
            raise UserError("--revision names a revision of --model; leave it out with --depth and --endpoint")
        unknown = sorted(set(self.mixes) - set(MIXES))
        if unknown or not self.mixes:
            raise UserError(f"--mixes has {', '.join(unknown) or 'nothing'}; choose from {', '.join(MIXES)}")
        if self.shared_tokens > self.prompt_tokens:
            raise UserError(f"--shared-tokens is {self.shared_tokens}, more than --prompt-tokens {self.prompt_tokens}")
        if not self.rate and not self.batch_sizes:
            raise UserError("--batch-sizes has nothing; give at least one")
        self.shape, self.slots, self.rates  # noqa: B018 - raises if a number cannot be read

    @property
    def slots(self) -> list[int]:
        """The numbers of ``--batch-sizes``: how many sequences run at the same time."""
        if wrong := next((text for text in self.batch_sizes if not text.isdecimal() or not int(text)), None):
            raise UserError(f"--batch-sizes has {wrong!r}; use whole numbers of at least 1, comma separated")
        return [int(text) for text in self.batch_sizes]

    @property
    def rates(self) -> list[float]:
        """The numbers of ``--rate``: requests per second; empty if the flag is not given."""
        return [_positive(text, "--rate") for text in self.rate]

    @property
    def shape(self) -> Shape:
        """The lengths of the requests."""
        return Shape(
            prompt=self.prompt_tokens,
            output=self.output_tokens,
            mixed_prompts=_range(self.mixed_prompts, "--mixed-prompts"),
            mixed_outputs=_range(self.mixed_outputs, "--mixed-outputs"),
            shared=self.shared_tokens,
            samples=self.samples,
        )


def run(settings: BenchEngineSettings, show: Callable[[str], None]) -> dict[str, Any]:
    """Measure and show the table row by row, and write ``bench.png`` and ``bench.json``.

    Returns the content of ``bench.json``.

    Raises:
        UserError: the benchmark is not possible, for example because the model or server is missing, because requests
            do not fit the model, or because no request was answered.
    """
    with opened(settings) as (client, model, limits), report_folder(settings) as folder:
        longest = settings.shape.longest(settings.mixes)
        if client.longest is not None and longest > client.longest:
            raise UserError(
                f"prompts and outputs reach {longest} tokens, but the context length is {client.longest}; "
                "lower --prompt-tokens, --output-tokens, --mixed-prompts or --mixed-outputs"
            )
        if limits is not None:
            show(
                f"limits: {limits.bytes_per_second / 1e9:,.1f} GB/s, {limits.flops_per_second / 1e9:,.0f} GFLOP/s "
                f"in {client.description['dtype']}"
            )
        show(HEADER)
        rows = []
        for row in measure(settings, client, model, limits):
            show(table_line(row))
            log.info("measured", extra=row)
            rows.append(row)
        if not any(row["answered"] for row in rows):
            raise UserError(f"no request was answered: {'; '.join(rows[0]['errors'])}")
        fields = {
            "target": client.description,
            "settings": describe(settings),
            "machine": describe_machine(),
            "limits": None if limits is None else dataclasses.asdict(limits),
            "rows": rows,
        }
        result = with_format(fields, RESULT_FORMAT)
        plot_benchmark(folder / "bench.png", rows)
        (folder / "bench.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def measure(settings: BenchEngineSettings, client: Client, model: GPT | None, limits: Limits | None) -> Iterator[Row]:
    """Measure every mix under every load. Warm-up requests come before each measurement.

    A row has the numbers of its :class:`~jobs.eval.bench.request_results.Summary`, the mix, and the load: ``slots``,
    the number of sequences that run at the same time, or ``rate``, in requests per second. ``bandwidth_share`` is the
    share of the machine's measured memory bandwidth that the steps of the inference core used at least
    (:func:`~jobs.eval.bench.roofline.least_costs`), and ``flops_share`` is the share of the machine's FLOP/s. Both are
    None if ``client`` measures a server.
    """
    loads: list[tuple[int | None, float | None]]
    loads = [(None, rate) for rate in settings.rates] or [(slots, None) for slots in settings.slots]
    for mix in settings.mixes:
        for number, (slots, rate) in enumerate(loads):
            log.info("measuring", extra={"mix": mix, "slots": slots, "rate": rate})
            salt = len(loads) * MIXES.index(mix) + number
            warm_up, requests, traffic = plan(settings, mix, slots, rate, client.vocabulary, salt)
            client.run(warm_up, Load(len(warm_up)))
            results = client.run(requests, traffic)
            row = {**dataclasses.asdict(summarize(results)), "mix": mix, "slots": slots, "rate": rate}
            row |= {"bandwidth_share": None, "flops_share": None}
            if isinstance(client, CoreClient) and model is not None and limits is not None:
                counts = [count for result in results for count in result.counts]
                read, computed = least_costs(model.config, model.compute_dtype.itemsize, counts, client.steps)
                row["bandwidth_share"] = read / client.step_seconds / limits.bytes_per_second
                row["flops_share"] = computed / client.step_seconds / limits.flops_per_second
            yield row


def plan(
    settings: BenchEngineSettings, mix: str, slots: int | None, rate: float | None, vocabulary: int, salt: int
) -> tuple[list[BenchRequest], list[BenchRequest], Load]:
    """The warm-up requests, the measured requests and the load of a row of the table.

    The load says when the measured requests are sent.

    Lengths and arrivals follow from the seed. Prompts for an endpoint have new tokens in every run, because the
    endpoint's prefix cache can contain the prompts of an earlier run. ``salt`` identifies the row by its mix and load:
    each row gets different prompts, so that the prefix cache does not contain any of the row's prompts yet.
    """
    shape = settings.shape
    choices = choices_per_request(mix, shape, slots or shape.samples)
    at_once = slots // choices if slots else 1
    # At least as many requests are sent as run at a time, because with fewer requests, some slots would stay empty.
    count = max(settings.requests or (_ARRIVALS if rate else _ROUNDS * at_once), at_once)
    content = secrets.randbits(64) if settings.endpoint else settings.seed
    make = functools.partial(make_requests, mix, choices=choices, vocabulary=vocabulary, seed=settings.seed)
    short = dataclasses.replace(shape, output=_WARM_UP_OUTPUT, mixed_outputs=(_WARM_UP_OUTPUT, _WARM_UP_OUTPUT))
    warm_up = make(short, count=at_once, content_seed=(content, salt, 0))
    requests = make(shape, count=count, content_seed=(content, salt, 1))
    load = Load(at_once) if rate is None else Load(arrivals=poisson_arrivals(rate, count, settings.seed))
    return warm_up, requests, load


@contextlib.contextmanager
def opened(settings: BenchEngineSettings) -> Iterator[tuple[Client, GPT | None, Limits | None]]:
    """Yield a client for the model or server that the settings name, the model, and this machine's measured limits.

    For a server, the model and the limits are None.
    """
    if settings.endpoint:
        with contextlib.closing(open_endpoint(settings)) as server:
            yield server, None, None
        return
    prepare_cpu(settings.threads)
    model, tokenizer, description = load_model(settings)
    log.info("measuring the machine's limits")
    limits = measure_limits(model.cos.device, model.compute_dtype)
    running = max([EngineConfig.max_running, *settings.slots])
    config = EngineConfig(
        max_running=running,
        token_budget=max(EngineConfig.token_budget, running),
        kv_cache_bytes=settings.kv_cache_mib << 20 or None,
        prefix_caching=settings.prefix_caching,
    )
    engine = Engine(model, tokenizer, config)
    engine.warm_up()
    with contextlib.closing(CoreClient(engine, description)) as core:
        yield core, model, limits


def open_endpoint(settings: BenchEngineSettings) -> NetworkClient:
    """A client for ``--endpoint``.

    Raises a :class:`UserError` if the address is malformed or contains a user name or a password, if the variable with
    the API key is not set, or if the server cannot be measured, for example because it does not answer.
    """
    variable, forms = settings.api_key_variable, "http://host:port/v1 or grpc://host:port"
    try:
        url = urllib.parse.urlsplit(settings.endpoint)
        url.port  # noqa: B018 - raises if the port is not a number
        httpx.URL(settings.endpoint)  # refuses some addresses that urlsplit accepts
    except (ValueError, httpx.InvalidURL) as error:
        raise UserError(f"--endpoint is not a URL ({error}); use {forms}") from error
    key = os.environ.get(variable, "") if variable else ""
    if variable and not key:
        raise UserError(f"--api-key-variable names {variable}, which is not set")
    if url.username or url.password:
        raise UserError("--endpoint has a user or password in it; give a key by --api-key-variable")
    if url.scheme == "grpc" and url.netloc and not url.path.strip("/"):
        return GrpcClient(url.netloc, settings.timeout_seconds)
    if url.scheme in ("http", "https") and url.netloc:
        return HttpClient(settings.endpoint, settings.model, key, settings.timeout_seconds)
    raise UserError(f"--endpoint is {settings.endpoint!r}; use {forms}")


def load_model(settings: BenchEngineSettings) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The model on its device, its tokenizer, and its description as JSON values."""
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    if settings.depth:
        config = ModelConfig.from_depth(
            settings.depth,
            vocab_size=settings.vocab_size,
            head_dim=settings.head_dim,
            context_length=settings.context_length,
        )
        model, tokenizer = random_model(config, dtype, settings.seed), random_tokenizer(settings.vocab_size)
        named = {"model": f"random weights, depth {settings.depth}"}
    else:
        checkpoint = pick_checkpoint(open_store(settings.home), settings.model, settings.revision, "sft")
        model, tokenizer = checkpoint.build_model(compute_dtype=dtype), checkpoint.tokenizer
        named = {"model": settings.model, "revision": checkpoint.ref.revision}
    description = {
        **named,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        **dataclasses.asdict(model.config),
    }
    return model.to(device), tokenizer, description


@contextlib.contextmanager
def report_folder(settings: BenchEngineSettings) -> Iterator[Path]:
    """Yield the folder for the results.

    Without ``--output``, the folder appears in the store when the context ends without an error.
    """
    if settings.output:
        yield make_output_folder(settings.output, "--output")
    else:
        store, name = open_store(settings.home), f"reports/{settings.report}"
        with Lease(store, name, "jobs.eval.bench_engine"), store.publish(name, last="bench.json") as folder:
            yield folder


def _positive(text: str, flag: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise UserError(f"{flag} has {text!r}; use positive numbers, comma separated")


def _range(text: str, flag: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)-([1-9]\d*)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise UserError(f"{flag} is {text!r}; use LEAST-GREATEST, such as 10-200")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    run_program(
        "jobs.eval.bench_engine",
        "bench-engine",
        BenchEngineSettings,
        lambda s: run(s, functools.partial(print, flush=True)),
    )
