"""A browser gets the progress of a training from the store through the engine and the gateway."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import grpc

from deploy.local import free_port
from nanochat_core.checkpoint import CheckpointRef, promote
from nanochat_core.progress import write_progress
from nanochat_core.protos import engine_pb2 as pb
from nanochat_core.store import open_store
from nanochat_core.training.checkpoint_writer import save_checkpoint
from services.gateway.api import progress
from tests.support.engine_models import BYTES, tiny_model
from tests.support.scripted_engine import ScriptedEngine, http_client, running_engine, running_gateway, until_ready
from tests.support.service_process import EngineProcess

RUN = {"recipe": "demo", "stages": ["data", "base", "sft"], "tokens": {}, "stage": "base", "state": "running"}
BASE = {"step": 3, "steps": 10, "curve": [[1, 5.0], [3, 4.0]], "held_out": [], "answers": []}


async def read(url: str) -> tuple[int, dict[str, Any]]:
    async with http_client(url) as http:
        answer = await http.get("/progress")
        return answer.status_code, answer.json()


async def until(url: str, **wanted: Any) -> dict[str, Any]:
    """Read the progress until it has these fields."""
    async with asyncio.timeout(60):
        while True:
            status, found = await read(url)
            if status == 200 and wanted.items() <= found.items():
                return found
            await asyncio.sleep(0.05)


async def test_a_page_sees_the_training_before_there_is_a_model_and_its_promotion(tmp_path: Path) -> None:
    store, port = open_store(str(tmp_path)), free_port()
    engine = EngineProcess(tmp_path, "--snapshots", port=port, ready=False)
    try:
        async with running_gateway(f"127.0.0.1:{port}") as url:
            engine.wait_for("waiting for a model")
            write_progress(store, "tiny", "run", RUN)
            write_progress(store, "tiny", "base", BASE)
            found = await until(url, model="tiny", promoted=None, served=None)
            assert RUN.items() <= found["run"].items()
            assert BASE.items() <= found["stages"]["base"].items()
            assert 0 <= found["age_seconds"] < 60

            ref = CheckpointRef("tiny", "sft", 2)
            save_checkpoint(store, ref, model=tiny_model(), tokenizer=BYTES, meta={"examples": ["Hi!"]})
            await until(url, served="sft/step_000002", promoted=None)
            await until_ready(url)
            async with http_client(url) as http:
                (model,) = (await http.get("/v1/models")).json()["data"]
            assert model["nanochat"]["examples"] == ["Hi!"], "the page offers what the model can do"
            promote(store, ref)
            await until(url, served="sft/step_000002", promoted="sft/step_000002")
    finally:
        assert engine.stop() == 0


async def test_without_a_training_there_is_nothing_to_see(tmp_path: Path) -> None:
    port = free_port()
    engine = EngineProcess(tmp_path, port=port, ready=False)
    try:
        engine.wait_for("waiting for a model")
        async with running_gateway(f"127.0.0.1:{port}") as url:
            async with asyncio.timeout(30):
                while (answer := await read(url))[0] == 503:
                    await asyncio.sleep(0.05)
            status, body = answer
            assert (status, body["error"]["code"]) == (404, "progress_not_found")
    finally:
        engine.stop()


async def test_an_engine_that_cannot_be_reached_is_no_server_error() -> None:
    async with running_gateway(f"127.0.0.1:{free_port()}") as url:
        status, body = await read(url)
        assert (status, body["error"]["code"]) == (503, "engine_unavailable")


class Failing(ScriptedEngine):
    """An engine whose store does not answer."""

    async def GetProgress(self, _request: Any, context: Any) -> pb.Progress:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the store does not answer")
        raise AssertionError("abort raises")


async def test_many_pages_cost_one_call_a_second_and_a_failing_engine_is_passed_over() -> None:
    failing = Failing()
    await failing.start()
    async with running_engine() as engine, running_gateway(failing.address, engine.address) as url:
        engine.progress = pb.Progress(model="nano", parts_json=json.dumps({"base": BASE}).encode(), age_seconds=2.0)
        await until(url, model="nano")
        await asyncio.sleep(progress._FRESH_SECONDS)
        before, began = engine.progress_reads, time.monotonic()
        answers = await asyncio.gather(*(read(url) for _ in range(50)))
        assert {status for status, _ in answers} == {200}
        assert answers[0][1]["run"] is None
        assert engine.progress_reads - before <= 1 + (time.monotonic() - began) / progress._FRESH_SECONDS
    await failing.stop()


async def test_an_engine_of_an_earlier_version_shows_no_progress() -> None:
    async with running_engine() as engine, running_gateway(engine.address) as url:
        async with asyncio.timeout(30):
            while (answer := await read(url))[0] == 503:
                await asyncio.sleep(0.05)
        assert (answer[0], answer[1]["error"]["code"]) == (404, "progress_not_found")
