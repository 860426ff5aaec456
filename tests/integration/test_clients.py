"""Client libraries of other projects work unchanged.

The tests run the programs of tests/clients. A test is skipped if its program's library is not installed.
"""

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from jobs.train.export import ExportSettings, export_checkpoint
from nanochat_core.checkpoint import CheckpointRef
from nanochat_core.checkpoint.promotion import promote
from nanochat_core.protos import engine_pb2 as pb
from nanochat_core.store import open_store
from tests.support.exported_models import save_random
from tests.support.lm_eval_task import TASK, assert_equal_to_ours, choice_items, write_task
from tests.support.scripted_engine import (
    TOKENIZER,
    ScriptedEngine,
    chunk,
    ids,
    running_engine,
    running_gateway,
    saying,
    until_ready,
)
from tests.support.service_process import EngineProcess, GatewayProcess

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

PROGRAMS = Path(__file__).parents[1] / "clients"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanochat-tests" / "clients"
CALL = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'


async def python_script(_request: pb.GenerateRequest, _context: Any) -> AsyncIterator[pb.GenerateChunk]:
    call = pb.ToolEvent(call=pb.ToolCall(call_index=0, code="6*7"))
    yield chunk(ids("It is ", "<|python_start|>", "6*7", "<|python_end|>"), events=[call])
    result = pb.ToolEvent(result=pb.ToolResult(call_index=0, status="ok", output="42"))
    yield chunk(ids("<|output_start|>", "42", "<|output_end|>"), events=[result])
    yield chunk(
        ids("42.", "<|assistant_end|>"),
        finish=pb.FINISH_REASON_STOP,
        usage=pb.Usage(prompt_tokens=5, completion_tokens=14),
    )


def answer(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
    """An answer that depends on the prompt: whether it has a tool's result, a tool, or a question for Python."""
    prompt = TOKENIZER.decode(request.prompt_token_ids)
    if "returned:" in prompt:
        return saying("It is 22 degrees.")(request, context)
    if request.sampling.WhichOneof("constraint"):
        return saying(CALL)(request, context)
    if prompt.endswith("python<|user_end|><|assistant_start|>"):
        return python_script(request, context)
    return saying("hello ", "world")(request, context)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[tuple[ScriptedEngine, str]]:
    async with running_engine(context_length=2048) as engine, running_gateway(engine.address) as url:
        engine.script = answer
        await until_ready(url)
        yield engine, url


async def run(program: str, *arguments: str) -> dict[str, Any]:
    """The output of a program. Skips the test if the program's library is not installed."""
    interpreter, path = {
        ".py": (str(CACHE / "python" / "bin" / "python"), PROGRAMS / program),
        ".mjs": (shutil.which("node"), CACHE / program),
        ".java": (shutil.which("java") if shutil.which("javac") else None, PROGRAMS / program),
    }[Path(program).suffix]
    if not (interpreter and Path(interpreter).exists() and path.exists()):
        pytest.skip(f"what {program} needs is not installed (tests/install-clients)")
    process = await asyncio.create_subprocess_exec(
        *(interpreter, str(path), *arguments),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(CACHE / "huggingface")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    found: dict[str, Any] = json.loads(out.decode().strip().splitlines()[-1])
    return found


@pytest.mark.parametrize("program", ["langchain_client.py", "litellm_client.py"])
async def test_a_python_library_works_unchanged(served: tuple[ScriptedEngine, str], program: str) -> None:
    found = await run(program, served[1])
    assert "maximum context length is 2048 tokens" in found.pop("overflow")
    assert found == {
        "whole": "hello world",
        "streamed": "hello world",
        "call": {"city": "Oslo"},
        "after_call": "It is 22 degrees.",
        "greeted": "hello world",
    }


async def test_the_node_client_of_openai_works_unchanged(served: tuple[ScriptedEngine, str]) -> None:
    assert await run("openai_node.mjs", served[1]) == {
        "whole": "hello world",
        "streamed": "hello world",
        "call": {"city": "Oslo"},
        "after_call": "It is 22 degrees.",
        "python": "It is 42.",
        "back": "hello world",
        "response": "hello world",
        "response_streamed": "hello world",
    }


async def test_the_ai_sdk_works_with_its_defaults(served: tuple[ScriptedEngine, str]) -> None:
    assert await run("ai_sdk.mjs", served[1]) == {
        "whole": "hello world",
        "streamed": "hello world",
        "call": {"city": "Oslo"},
        "after_call": "It is 22 degrees.",
        "chat": "hello world",
    }


async def test_the_http_client_of_the_jdk_works_with_its_offer_of_http_2(served: tuple[ScriptedEngine, str]) -> None:
    found = await run("JdkClient.java", served[1])
    assert found["statuses"] == [200, 200]
    assert found["whole"]["choices"][0]["message"]["content"] == "hello world"
    assert found["events"] > 3


async def test_lm_eval_finds_our_own_log_likelihoods(tmp_path: Path) -> None:
    ref, store, items = CheckpointRef("ours", "sft", 30), open_store(str(tmp_path / "home")), choice_items(24)
    save_random(store, ref)
    promote(store, ref)
    export_checkpoint(
        ExportSettings(home=str(store), model=ref.model, format="huggingface", folder=str(tmp_path / "out"))
    )
    # The tokenizer gets a folder without the network's code, because transformers would need torch for this code.
    (tmp_path / "tokenizer").mkdir()
    for file in (tmp_path / "out").glob("tokenizer*.json"):
        shutil.copy(file, tmp_path / "tokenizer")
    with contextlib.ExitStack() as stack:
        engine = EngineProcess(tmp_path / "home", model=ref.model)
        stack.callback(engine.stop)
        gateway = GatewayProcess(engine.address)
        stack.callback(gateway.stop)
        where = (gateway.url, ref.model, str(tmp_path / "tokenizer"))
        theirs = await run("lm_eval_client.py", *where, str(write_task(tmp_path, items)), TASK)
    assert_equal_to_ours(store, ref, tmp_path, items, theirs)
