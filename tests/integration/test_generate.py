"""``nanochat generate`` shows a model's text in the terminal while it is written."""

import io
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.eval.generate import GenerateSettings, Piece, in_order, pieces, read_prompt, run
from nanochat_core import tokenizer as tok
from nanochat_core.checkpoint import CheckpointRef
from nanochat_core.engine import FinishReason, Output, Token
from nanochat_core.errors import UserError
from nanochat_core.store import open_store
from nanochat_core.training.checkpoint_writer import save_checkpoint
from tests.support.engine_models import BYTES, scripted_model, tiny_model

ROOT = Path(__file__).parents[2]
STORY = "abécd\n"
ANSWER = f"{tok.ASSISTANT_START}{tok.PYTHON_START}3+4{tok.PYTHON_END}{tok.OUTPUT_END}Is: 7{tok.ASSISTANT_END}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two models: ``writer`` has a base and a chat stage with one text each, ``random`` a base stage."""
    home = tmp_path_factory.mktemp("home")
    store = open_store(str(home))
    for model, stage, network in (
        ("writer", "base", scripted_model(STORY + tok.BOS)),
        ("writer", "sft", scripted_model(ANSWER)),
        ("random", "base", tiny_model()),
    ):
        save_checkpoint(store, CheckpointRef(model, stage, 1), model=network, tokenizer=BYTES, meta={})
    return home


class Shown:
    """What a run shows: the pieces of text, and all tool calls."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.pieces: list[str] = []
        self.tools = ""
        given = {"model": "writer", "temperature": 0.0, "threads": 1} | settings
        run(GenerateSettings(home=str(home), **given), self.pieces.append, self._tool)

    def _tool(self, text: str) -> None:
        self.tools += text

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def test_a_base_model_continues_the_prompt_to_the_end_of_the_document(home: Path) -> None:
    assert Shown(home, prompt="a", revision="base/step_000001").text == "bécd\n"
    assert Shown(home, prompt="a", stage="base", echo=True).text == STORY
    assert Shown(home, prompt="a", revision="base/step_000001", max_tokens=1).text == "b\n"
    assert Shown(home, prompt="a", revision="base/step_000001", max_tokens=2).text == "b\ufffd\n", "half a character"


def test_a_chat_model_answers_and_calls_python(home: Path) -> None:
    shown = Shown(home, prompt="What is 3 + 4?")
    assert (shown.text, shown.tools) == ("Is: 7\n", ">>> 3+4\n7\n")
    assert Shown(home, prompt="What is 3 + 4?", system="Be brief.").text == "Is: 7\n"


def test_a_chat_model_can_continue_text_and_a_base_model_answer(home: Path) -> None:
    assert Shown(home, prompt="I", mode="text").text == "s: 7\n"
    asked = Shown(home, prompt="a", mode="chat", model="random", tools=False, max_tokens=5, seed=1)
    assert asked.text != Shown(home, prompt="a", model="random", max_tokens=5, seed=1).text


def test_a_seed_gives_the_same_text_again_and_no_seed_another_one(home: Path) -> None:
    def text(**settings: Any) -> str:
        return Shown(home, model="random", prompt="Once", temperature=1.0, max_tokens=40, **settings).text

    assert text(seed=1) == text(seed=1)
    assert text(seed=1) != text(seed=2)
    assert text() != text()


def test_samples_come_one_after_another_and_each_is_the_same_in_any_number(home: Path) -> None:
    def text(samples: int) -> str:
        given = {"model": "random", "prompt": "Once", "temperature": 1.0, "top_k": 20, "max_tokens": 30, "seed": 3}
        return Shown(home, samples=samples, **given).text

    three = text(3)
    parts = [part.split(" ---\n", 1)[1] for part in three.split("--- ")[1:]]
    assert three.startswith("--- 1 of 3 ---\n")
    assert parts[0] == text(1)
    assert len(set(parts)) == 3


def output(index: int, ids: list[int], *, last: bool = False) -> Output:
    reason = FinishReason.STOP if last else None
    return Output([Token(id) for id in ids], finish_reason=reason, request_id="x", index=index)


def test_text_appears_as_soon_as_its_characters_are_complete() -> None:
    outputs = [output(0, [104]), output(0, [0xC3]), output(0, [0xA9, 105]), output(0, [BYTES.bos_id], last=True)]
    assert [piece.text for piece in pieces(outputs, BYTES)] == ["h", "", "éi", ""]


def test_pieces_of_later_samples_wait_and_each_sample_ends_its_line() -> None:
    def piece(index: int, text: str, last: bool = False) -> Piece:
        return Piece(index, text, "", 1, first=False, last=last)

    found = [piece(1, "B"), piece(0, "A"), piece(2, "C\n", True), piece(1, "b", True), piece(0, "", True)]
    assert [piece.text for piece in in_order(found, 3)] == ["A", "\n", "B", "b\n", "C\n"]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"model": "nobody"}, "model 'nobody' has no base or sft or rl checkpoint"),
        ({"model": "../x"}, "x"),
        ({"revision": "base/step_000009"}, "step_000009"),
        ({"prompt": "x" * 600, "mode": "text"}, "the prompt has 601 tokens, but the context length is 512"),
        ({"prompt": " \n"}, "the message is empty"),
        ({"mode": "text", "system": "Be brief."}, "--system belongs to a chat"),
        ({"top_p": 2.0}, "top_p is 2.0; it must be above 0 and at most 1"),
    ],
)
def test_what_cannot_be_generated_is_a_clear_error(home: Path, settings: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Shown(home, **({"prompt": "a"} | settings))


def test_the_prompt_comes_from_standard_input_if_there_is_no_other() -> None:
    def stdin(content: bytes) -> io.TextIOWrapper:
        return io.TextIOWrapper(io.BytesIO(content))

    assert read_prompt("", stdin(b"no")) == ""
    assert read_prompt(None, stdin("Grüße\n\n".encode())) == "Grüße\n"
    with pytest.raises(UserError, match=r"not UTF-8 text \(at byte 2\)"):
        read_prompt(None, stdin(b"ab\xff"))
    with pytest.raises(UserError, match="there is no prompt"):
        read_prompt(None, None)
    screen, keyboard = pty.openpty()
    with open(keyboard, encoding="utf-8") as terminal, pytest.raises(UserError, match="there is no prompt"):
        read_prompt(None, terminal)
    os.close(screen)


def command(home: Path, *arguments: str) -> list[str]:
    flags = ["--model", "writer", "--home", str(home), "--threads", "1", "--temperature", "0"]
    return [sys.executable, "-m", "deploy.cli", "generate", *flags, *arguments]


def test_the_command_writes_text_to_stdout_and_calls_to_stderr(home: Path) -> None:
    done = subprocess.run(command(home, "What is", "3 + 4?"), cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("Is: 7\n", ">>> 3+4\n7\n")
    done = subprocess.run(
        command(home, "--mode", "text"), cwd=ROOT, input="I\n", capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("s: 7\n", "")
    done = subprocess.run(command(home, "--top-p", "0", "a"), cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("python -m jobs.eval.generate: error: top_p is 0.0")


def test_a_reader_that_goes_away_ends_the_command_without_a_word(home: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command(home, "a"), cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == b">>> 3+4\n7\n"
