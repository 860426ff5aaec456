"""While an engine waits for its first model, the gateway says which program makes the model and how far it is."""

import asyncio
import contextlib
import functools
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from nanochat_core.checkpoint import CheckpointRef, promote
from nanochat_core.progress import write_progress
from nanochat_core.protos import engine_pb2 as pb
from nanochat_core.store import Lease, open_store
from nanochat_core.training.checkpoint_writer import save_checkpoint
from services.engine.training_watch import TrainingWatch
from tests.support.engine_models import BYTES, tiny_model
from tests.support.held_port import HeldPort
from tests.support.scripted_engine import ScriptedEngine, http_client, running_engine, running_gateway, until_ready
from tests.support.service_process import EngineProcess
from tests.support.tiny_training import NAME, PRETRAIN, STEPS, Job, argv, fill

WAITING = "Of 1 known engine, 1 is not ready (loading a model or shutting down)."


@contextlib.contextmanager
def waiting_engine(home: Path) -> Iterator[str]:
    """The address of a real engine that serves the promoted model ``tiny`` of the store once there is one."""
    held = HeldPort()
    engine = EngineProcess(home, port=held.port, ready=False)
    try:
        yield f"127.0.0.1:{held.port}"
    finally:
        engine.stop()
        held.close()


async def until_said(url: str, sentence: str | None) -> None:
    async with http_client(url) as http, asyncio.timeout(60):
        while (said := (await http.get("/readyz")).json()["waits_for"]) != sentence:
            assert said is not None, "an engine is ready"
            await asyncio.sleep(0.05)


async def test_the_progress_of_the_training_is_told_until_the_model_serves(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with waiting_engine(tmp_path) as address:
        async with running_gateway(address) as url:
            await until_said(url, f"{WAITING} An engine says: no model is loaded yet.")
            with Lease(store, "tokenizers/tiny", "jobs.train.tokenizer"):
                await until_said(url, f"{WAITING} An engine says: no model is loaded yet; jobs.train.tokenizer.")
            with Lease(store, "models/tiny", "jobs.train.pretrain") as lease:
                told = {"program": lease.program, "step": 120, "steps": 320, "eta_seconds": 95.2}
                write_progress(store, "tiny", "base", told)
                progress = "jobs.train.pretrain: step 120 of 320, 0:01:35 left"
                await until_said(url, f"{WAITING} An engine says: no model is loaded yet; {progress}.")
            ref = CheckpointRef("tiny", "sft", 1)
            save_checkpoint(store, ref, model=tiny_model(), tokenizer=BYTES, meta={})
            promote(store, ref)
            await until_ready(url)
            async with http_client(url) as http:
                assert (await http.get("/readyz")).json() == {"status": "ready", "models": ["tiny"], "waits_for": None}


def tells(watch: TrainingWatch, pattern: str) -> bool:
    return re.fullmatch(pattern, watch.summary()) is not None


def test_a_training_job_tells_its_steps_and_nothing_after_its_end(tmp_path: Path) -> None:
    # The job has so many steps that it cannot end before this process looks at it.
    for steps, code in ((100_000, 128 + signal.SIGTERM), (STEPS, 0)):
        home = tmp_path / str(steps)
        watch = TrainingWatch(fill(home), NAME)
        flags = {**PRETRAIN, "home": str(home), "steps": steps}
        job = Job("jobs.train.pretrain", argv(flags), tmp_path / f"log-{steps}")
        if code:
            step = rf"jobs\.train\.pretrain: step \d+ of {steps}, \d+:\d\d:\d\d left"
            job.wait_until(functools.partial(tells, watch, step))
            job.signal(signal.SIGTERM)
        assert job.wait(60) == code, job.stderr
        assert watch.summary() == ""


class Waiting(ScriptedEngine):
    """An engine that is not ready, because it has no model yet."""

    reason = "no model is loaded yet; jobs.train.sft"

    async def GetLoad(self, request: pb.GetLoadRequest, context: Any) -> pb.Load:
        await context.abort(grpc.StatusCode.UNAVAILABLE, self.reason)
        raise AssertionError("abort raises")


@pytest.mark.parametrize("status", ["NOT_SERVING", "SERVICE_UNKNOWN"])
async def test_engines_that_wait_for_the_same_training_say_so_once(status: str) -> None:
    engines = [Waiting(), Waiting()]
    for engine in engines:
        await engine.start()
        await engine.health.set("", health_pb2.HealthCheckResponse.ServingStatus.Value(status))
    try:
        async with running_gateway(*(engine.address for engine in engines)) as url:
            expected = "Of 2 known engines, 2 are not ready (loading a model or shutting down)."
            await until_said(url, f"{expected} An engine says: {Waiting.reason}.")
    finally:
        for engine in engines:
            await engine.stop()


async def test_an_engine_that_ends_says_nothing() -> None:
    async with running_engine() as engine, running_gateway(engine.address) as url:
        await until_ready(url)
        await engine.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        async with http_client(url) as http, asyncio.timeout(30):
            while (said := (await http.get("/readyz")).json()["waits_for"]) is None:
                await asyncio.sleep(0.05)
        assert said == WAITING
