"""A killed chat evaluation resumes at its last chunk and ends with the same result, on one or several ranks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Never

import pytest
import torch

from jobs.data.dataset_files import DatasetSource
from jobs.demo_world.documents import pretraining_documents
from jobs.eval import chat
from jobs.eval.chat import ChatEvalSettings
from jobs.eval.chat_eval import evaluate_tasks
from jobs.eval.chat_eval.evaluate_tasks import generate
from jobs.results.evaluations import Evaluation, results
from jobs.results.metrics import metrics_of
from jobs.tasks.registry import Selection, open_tasks
from jobs.train.tokenizer import train_tokenizer
from nanochat_core.checkpoint import Checkpoint, CheckpointRef, load_checkpoint
from nanochat_core.config import ModelConfig
from nanochat_core.engine import Engine, EngineConfig, SamplingParams
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.store import open_store
from nanochat_core.training.checkpoint_writer import save_checkpoint
from nanochat_core.training.distributed import Ranks
from tests.support.ranks import run_ranks

ROOT = Path(__file__).parents[2]
REF = CheckpointRef("untrained", "sft", 7)
FOLDER = "evaluations/untrained/sft/step_000007/chat"
QUESTIONS, CHUNKS = 80, 3


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with an untrained model and a file of multiple-choice questions."""
    home = tmp_path_factory.mktemp("filled") / "home"
    tokenizer = train_tokenizer(pretraining_documents(seed=1, n=100), 400)
    model = GPT(ModelConfig.from_depth(1, vocab_size=400, head_dim=32, context_length=160))
    generator = torch.Generator().manual_seed(3)
    model.init_weights(generator)
    with torch.no_grad():
        model.head.weight.normal_(generator=generator)
    store = open_store(str(home))
    save_checkpoint(store, REF, model=model, tokenizer=tokenizer, meta={})
    rows = ({"question": f"Number {i}?", "choices": ["a", "b", "c"], "answer": i % 3} for i in range(300))
    store.write("choices.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return home


@pytest.fixture
def home(filled: Path, tmp_path: Path) -> Path:
    shutil.copytree(filled, tmp_path / "home")
    return tmp_path / "home"


def settings(home: Path, **changes: Any) -> ChatEvalSettings:
    """Settings with several sampled answers per question. Any difference between two runs then shows."""
    given: dict[str, Any] = {
        "tasks": ("spelling", str(home / "choices.jsonl")),
        "items": QUESTIONS,
        "samples": 2,
        "temperature": 1.0,
        "batch": 16,
        "device": "cpu",
    }
    return ChatEvalSettings(model=REF.model, home=str(home), **given | changes)


def result_of(home: Path) -> bytes:
    (path,) = (home / FOLDER).glob("*/result.json")
    return path.read_bytes()


def parts(home: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (home / FOLDER).glob("*/parts-*/*.json")}


@pytest.fixture(scope="module")
def uninterrupted(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    home = tmp_path_factory.mktemp("uninterrupted") / "home"
    shutil.copytree(filled, home)
    chat.run(settings(home), lambda _: None)
    return result_of(home)


# A run that kills itself in a given step of the engine.
KILLED = """
import json, os, signal, sys
import torch
from jobs.eval import chat
from nanochat_core.engine import Engine

torch.set_num_threads(1)
step, steps = Engine.step, [0]

def killed(engine):
    steps[0] += 1
    if steps[0] == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(engine)

Engine.step = killed
given = json.loads(sys.argv[1])
chat.run(chat.ChatEvalSettings(**given | {"tasks": tuple(given["tasks"])}), print)
"""


def test_a_killed_evaluation_goes_on_without_repeating_what_was_finished(
    home: Path, uninterrupted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = json.dumps(vars(settings(home)))
    killed = subprocess.run([sys.executable, "-c", KILLED, given, "700"], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    finished = parts(home)
    spelled = [name for name in finished if name.startswith("spelling")]
    assert 0 < len(spelled) < CHUNKS
    assert "choices-00000" in finished
    assert not list((home / FOLDER).glob("*/result.json"))

    asked: list[int] = []
    kept: list[str] = []

    def watched(engine: Any, tokenizer: Any, task: Any, numbers: Any, *sampling: Any) -> Any:
        asked.extend(numbers)
        return generate(engine, tokenizer, task, numbers, *sampling)

    save_part = Evaluation.save_part
    monkeypatch.setattr(evaluate_tasks, "generate", watched)

    def keeping(self: Any, name: Any, value: Any) -> None:
        kept.append(name)
        save_part(self, name, value)

    monkeypatch.setattr(Evaluation, "save_part", keeping)
    chat.run(settings(home), lambda _: None)
    assert result_of(home) == uninterrupted
    assert not set(kept) & set(finished)
    assert sorted(asked) == [n for n in range(QUESTIONS) if f"spelling-{n // 32:05d}" not in finished]
    assert len(asked) >= QUESTIONS - 32 * len(spelled) > 0
    assert parts(home) == {}


def test_what_was_kept_is_what_counts(home: Path, uninterrupted: bytes) -> None:
    """The test changes a stored part of an interrupted run. The change is in the result, so the part was reused."""
    evaluation = None

    def stop_after_first(self: Any, name: Any, value: Any) -> Never:
        nonlocal evaluation
        evaluation = self
        original(self, name, value)
        raise KeyboardInterrupt

    original = Evaluation.save_part
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluation, "save_part", stop_after_first)
        with pytest.raises(KeyboardInterrupt):
            chat.run(settings(home, tasks=("spelling",)), lambda _: None)
    (name,) = parts(home)
    assert evaluation is not None
    evaluation.save_part(name, [[{**a, "right": True} for a in answers] for answers in evaluation.part(name)])
    result = chat.run(settings(home, tasks=("spelling",)), lambda _: None)
    assert result is not None
    assert result["tasks"]["spelling"]["right"] == 32 * 2 + json.loads(uninterrupted)["tasks"]["spelling"]["right"]


def on_rank(ranks: Ranks, home: str) -> Any:
    result = chat.run(settings(Path(home)), lambda _: None, ranks=ranks)
    return result and result["identity"]


def test_two_ranks_find_what_one_finds(home: Path, uninterrupted: bytes) -> None:
    leader, other = run_ranks(2, on_rank, str(home))
    assert other is None
    assert leader == json.loads(uninterrupted)["identity"]
    assert result_of(home) == uninterrupted


def on_rank_with_a_result(ranks: Ranks, home: str, rank: int, result: dict[str, Any]) -> Any:
    """Like on_rank, but only ``rank`` finds a result, as if another program had stored it or deleted it meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank == rank:
            patch.setattr(Evaluation, "result", lambda _: result)
        return on_rank(ranks, home)


def test_the_first_rank_decides_for_all_whether_there_is_a_result(home: Path, uninterrupted: bytes) -> None:
    stored = json.loads(uninterrupted)
    found = run_ranks(2, on_rank_with_a_result, str(home), 0, stored)
    assert found == [stored["identity"]] * 2
    assert not (home / FOLDER).exists(), "a rank evaluated although the first rank had found the result"
    found = run_ranks(2, on_rank_with_a_result, str(home), 1, stored)
    assert found == [stored["identity"], None], "a rank did not evaluate although the first rank had found no result"
    assert result_of(home) == uninterrupted


def test_a_rank_with_a_store_of_its_own_is_named(home: Path) -> None:
    alone = settings(home, tasks=("spelling",))
    with pytest.raises(UserError, match=r"spelling-00001 of another rank is not in .*; all ranks need the same store"):
        chat.run(alone, lambda _: None, ranks=Ranks(rank=0, size=2))


def test_other_settings_are_another_evaluation(home: Path) -> None:
    small = {"tasks": ("spelling",), "items": 4}
    first = chat.run(settings(home, **small), lambda _: None)
    for changes in ({"seed": 1}, {"samples": 3}, {"temperature": 0.5}, {"top_k": 5}, {"items": 5}, {"dtype": "bf16"}):
        other = chat.run(settings(home, **small | changes), lambda _: None)
        assert first is not None
        assert other is not None
        assert other["identity"] != first["identity"], changes
    assert chat.run(settings(home, **small, batch=8, threads=1), lambda _: None) == first


def test_results_of_different_tasks_and_samplings_stand_side_by_side(home: Path) -> None:
    few: dict[str, Any] = {"items": 4, "samples": 1, "temperature": 0.0}
    first = chat.run(settings(home, tasks=("spelling",), **few), lambda _: None)
    second = chat.run(settings(home, tasks=("counting",), **few), lambda _: None)
    sampled = chat.run(settings(home, tasks=("spelling",), items=4), lambda _: None)
    again = chat.run(settings(home, tasks=("spelling",), **few | {"items": 5}), lambda _: None)
    assert first is not None
    assert second is not None
    assert sampled is not None
    assert again is not None
    store = open_store(str(home))
    kept = {result["identity"] for result in results(store, REF.model)}
    assert kept == {second["identity"], sampled["identity"], again["identity"]}, "the same tasks again replace a result"
    metrics = metrics_of(store, load_checkpoint(store, REF))
    assert metrics["chat.spelling.accuracy"].value == again["tasks"]["spelling"]["accuracy"], "greedy answers count"
    assert metrics["chat.spelling.pass_at_k.2"].value == sampled["tasks"]["spelling"]["pass_at_k"]["2"]
    assert metrics["chat.counting.accuracy"].value == second["tasks"]["counting"]["accuracy"]


def test_a_result_without_a_task_of_chat_core_comes_before_one_with_such_a_task(home: Path) -> None:
    store = open_store(str(home))
    checkpoint = load_checkpoint(store, REF)
    task = {"accuracy": 0.5, "centered": 0.5}
    for key, chatcore, missing, accuracy in (("a", 0.5, ["mmlu"], 0.25), ("b", None, [], 0.75)):
        result = {"chatcore": chatcore, "missing": missing, "tasks": {"demo": task | {"accuracy": accuracy}}}
        Evaluation.of(store, checkpoint, "chat", {"tasks": key}, key).finish(result)
    assert metrics_of(store, checkpoint)["chat.demo.accuracy"].value == 0.25


def test_an_interrupted_evaluation_keeps_its_parts_while_other_tasks_are_evaluated(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat, "evaluate_generative", interrupted)
        with pytest.raises(KeyboardInterrupt):
            chat.run(settings(home), lambda _: None)
    finished = parts(home)
    assert finished
    chat.run(settings(home, tasks=("counting",), items=4), lambda _: None)
    assert parts(home) == finished


def test_an_answer_depends_on_neither_the_batch_nor_the_other_questions(home: Path) -> None:
    checkpoint: Checkpoint = load_checkpoint(open_store(str(home)), REF)
    (task,) = open_tasks(["spelling"], DatasetSource(open_store(str(home))), Selection(items=30))

    def answers(numbers: list[int], running: int, seed: int = 5) -> dict[int, Any]:
        engine = Engine(checkpoint.build_model(), checkpoint.tokenizer, EngineConfig(max_running=running))
        sampling = SamplingParams(temperature=1.0, seed=seed)
        return dict(generate(engine, checkpoint.tokenizer, task, numbers, sampling, 3))  # type: ignore[arg-type]

    together = answers(list(range(30)), 64)
    assert sorted(together) == list(range(30))
    assert all(len(set(responses)) == 3 for responses in together.values())
    alone = answers([20, 3], 3)
    assert alone == {number: together[number] for number in (20, 3)}
    assert answers([3], 3, seed=6)[3] != together[3]


def test_questions_that_do_not_fit_are_wrong_and_the_others_are_answered(home: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "word " * n}], "answer": "x"} for n in (1, 2000, 3)]
    (home / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines: list[str] = []
    result = chat.run(settings(home, tasks=(str(home / "long.jsonl"),), items=0), lines.append)
    assert result is not None
    long = result["tasks"]["long"]
    assert (long["questions"], long["answers"], long["too_long"]) == (3, 6, 1)
    assert "long: 1 questions do not fit the model's context and count as wrong" in lines
