"""The sandbox prints for the code of the demo world what its conversations say."""

import random

import pytest

from jobs.demo_world.conversations import draw
from jobs.demo_world.tool_questions import QUESTIONS
from jobs.generation import SandboxTool
from nanochat_core.sandbox import SandboxExecutor

KINDS = ("arithmetic", "expression", "decimal", "comparison", "everyday", "problem", "counting", "spelling")


@pytest.mark.parametrize("kind", KINDS)
async def test_the_sandbox_prints_what_the_conversations_say(kind: str) -> None:
    rng = random.Random(3)
    count = 300 if kind in ("everyday", "spelling") else 50
    with SandboxExecutor() as executor:
        tool = SandboxTool(executor)
        for _ in range(count):
            answer = draw(rng, "train", kind)[0].answer
            assert not isinstance(answer, str)
            code, output, _ = (part["text"] for part in answer)
            ran = await tool(code, request_id="1", timeout_seconds=10)
            assert ran.output == output, code


async def test_the_sandbox_finds_the_letters_of_the_alphabet() -> None:
    (code,) = (code for code in QUESTIONS.alphabet if "{c}" not in code)
    with SandboxExecutor() as executor:
        ran = await SandboxTool(executor)(code, request_id="1", timeout_seconds=10)
    assert ran.output == " ".join("abcdefghijklmnopqrstuvwxyz")
