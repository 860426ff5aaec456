"""A rollback: jobs on a store that a newer version wrote are refused, and change nothing in the store."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.data import shards, tokenizers
from jobs.results import evaluations
from nanochat_core import config, tokenizer
from nanochat_core.checkpoint import CheckpointRef, load_checkpoint, loading, manifest, promote
from nanochat_core.model import GPT
from nanochat_core.training import checkpoint_writer
from tests.support.service_process import EngineProcess
from tests.support.tiny_training import NAME, PRETRAIN, SFT, Jobs, fill

STEPS = {"steps": 4, "save-every": 2, "eval-every": 0}
CORE = {"model": NAME, "bundle": "missing"}
# The constants that hold the version of each format, with their modules. The checkpoint writer has names of its own for
# two of them, because it imports them with "from".
FORMATS: dict[str, list[tuple[Any, str]]] = {
    "manifest": [(manifest, "FORMAT")],
    "config": [(config, "FORMAT")],
    "tokenizer": [(tokenizer, "FORMAT_VERSION")],
    "meta": [(loading, "META_FORMAT"), (checkpoint_writer, "META_FORMAT")],
    "trainer state": [(loading, "TRAINER_STATE_FORMAT"), (checkpoint_writer, "TRAINER_STATE_FORMAT")],
    "dataset": [(shards, "MANIFEST_FORMAT")],
}
CHECKPOINT = ("manifest", "config", "tokenizer", "meta")


def digests(home: Path) -> dict[str, str]:
    """Digests of all files of the store, hidden files too."""
    return {
        path.relative_to(home).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in home.rglob("*")
        if path.is_file()
    }


def write_with(formats: tuple[str, ...], home: Path) -> None:
    """Write a dataset, a tokenizer and checkpoints of each stage as a version with newer ``formats`` would do."""
    with pytest.MonkeyPatch.context() as newer:
        for name in formats:
            for module, constant in FORMATS[name]:
                newer.setattr(module, constant, getattr(module, constant) + 1)
        fill(home)
        jobs = Jobs(home, home)
        stored = tokenizers.load_tokenizer(jobs.store, NAME)
        shape = config.ModelConfig.from_depth(2, vocab_size=stored.vocab_size, head_dim=16, context_length=32)
        for stage in ("base", "sft"):
            for step in (2, 4):
                ref = CheckpointRef(NAME, stage, step)
                meta = {"settings": {}, "inputs": {}, "plan": {"batch_tokens": 256}, "finished": True, "step": step}
                run = {"run": {"step": step}}
                checkpoint_writer.save_checkpoint(
                    jobs.store, ref, model=GPT(shape), tokenizer=stored, meta=meta, values=run, shards=()
                )
                assert load_checkpoint(jobs.store, ref).ref == ref
        promote(jobs.store, CheckpointRef(NAME, "sft", 4))


@pytest.fixture(scope="module", params=[*FORMATS, "all"])
def newer_home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    home = tmp_path_factory.mktemp("newer") / "home"
    write_with(tuple(FORMATS) if request.param == "all" else (request.param,), home)
    return request.param, home


@pytest.fixture
def newer(newer_home: tuple[str, Path], tmp_path: Path) -> tuple[str, Jobs]:
    shutil.copytree(newer_home[1], tmp_path / "home")
    (tmp_path / "logs").mkdir()
    return newer_home[0], Jobs(tmp_path / "home", tmp_path / "logs")


REFUSED_BY: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "pretrain": ("jobs.train.pretrain", PRETRAIN | STEPS, (*CHECKPOINT, "trainer state", "dataset")),
    "start over": (
        "jobs.train.pretrain",
        PRETRAIN | STEPS | {"no-resume": True},
        (*CHECKPOINT, "trainer state", "dataset"),
    ),
    "sft": ("jobs.train.sft", SFT | STEPS, (*CHECKPOINT, "trainer state")),
    "tokenizer": (
        "jobs.train.tokenizer",
        {"dataset": NAME, "name": NAME, "vocab-size": 300},
        ("tokenizer", "dataset"),
    ),
    "gate": ("jobs.eval.gate", {"model": NAME, "promote": True}, CHECKPOINT),
    "core": ("jobs.eval.core", CORE, CHECKPOINT),
    "report": ("jobs.eval.report", {"model": NAME, "recipe": "demo"}, (*CHECKPOINT, "dataset")),
}


@pytest.mark.parametrize("job", REFUSED_BY)
def test_a_job_on_a_newer_store_is_refused_and_changes_nothing(newer: tuple[str, Jobs], job: str) -> None:
    raised, jobs = newer
    module, flags, refuses = REFUSED_BY[job]
    if raised not in (*refuses, "all"):
        pytest.skip(f"{module} does not read it")
    before = digests(jobs.home)
    started = jobs.start(module, flags)
    assert started.wait() == 2
    (line,) = [line for line in started.stderr.splitlines() if not line.startswith("{")]
    assert line.startswith(f"python -m {module}: error: ")
    assert "a newer version of nanochat wrote it, and nothing was changed; use that version, or another name" in line
    assert digests(jobs.home) == before


def test_an_engine_on_a_newer_store_ends_with_one_line_and_changes_nothing(newer: tuple[str, Jobs]) -> None:
    raised, jobs = newer
    if raised not in (*CHECKPOINT, "all"):
        pytest.skip("the engine does not read it")
    before = digests(jobs.home)
    engine = EngineProcess(jobs.home, model=NAME, ready=False)
    assert engine.process.wait(120) == 2
    engine.stop()
    (line,) = [event["text"] for event in engine.events if event["event"] == "text"]
    assert line.startswith(f"python -m services.engine: error: models/{NAME}/sft/step_000004/")
    assert "a newer version of nanochat wrote it, and nothing was changed" in line
    assert digests(jobs.home) == before


def test_a_newer_evaluation_result_is_neither_read_nor_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_with((), tmp_path / "home")
    (tmp_path / "logs").mkdir()
    jobs = Jobs(tmp_path / "home", tmp_path / "logs")
    ref = CheckpointRef(NAME, "sft", 4)
    with monkeypatch.context() as patched:
        patched.setattr(evaluations, "_FORMAT", evaluations._FORMAT + 1)
        digest = manifest.load_manifest(jobs.store, ref).weights_digest
        evaluations.Evaluation(jobs.store, ref, digest, "core", {}).finish({"core": 0.5})
    before = digests(jobs.home)
    started = jobs.start("jobs.eval.gate", {"model": NAME})
    assert started.wait() == 2
    assert "result.json has format" in started.stderr
    assert digests(jobs.home) == before
