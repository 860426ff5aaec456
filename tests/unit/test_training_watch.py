"""The engine reads from the store which program is training its model, and how far the training has come."""

import math
import time
from pathlib import Path

import pytest

from nanochat_core.progress import write_progress
from nanochat_core.store import FolderStore, Lease
from services.engine.training_watch import TrainingWatch

STEPS = {"program": "jobs.train.sft", "step": 12, "steps": 320, "eta_seconds": 3671.6}


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


def test_steps_are_told_of_the_program_that_works_alone(store: FolderStore) -> None:
    watch = TrainingWatch(store, "m")
    write_progress(store, "m", "run", {"state": "running"})
    write_progress(store, "m", "base", STEPS | {"program": "jobs.train.pretrain", "eta_seconds": None})
    assert watch.summary() == ""
    with Lease(store, "models/m", "jobs.train.pretrain"):
        assert watch.summary() == "jobs.train.pretrain: step 12 of 320"
    with Lease(store, "models/m", "jobs.train.sft"):
        assert watch.summary() == "jobs.train.sft"
        write_progress(store, "m", "sft", STEPS)
        assert watch.summary() == "jobs.train.sft: step 12 of 320, 1:01:12 left"
        with Lease(store, "reports/m", "jobs.eval.report"):
            assert watch.summary() == "jobs.eval.report"
    assert watch.summary() == ""


def test_steps_that_a_newer_version_tells_are_left_out(store: FolderStore) -> None:
    store.write("progress/m/sft.json", b'{"format": 99}')
    with Lease(store, "models/m", "jobs.train.sft"):
        assert TrainingWatch(store, "m").summary() == "jobs.train.sft"


def test_a_program_that_works_is_a_sign_of_life_although_it_writes_no_progress(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = TrainingWatch(store, "m")
    with pytest.raises(FileNotFoundError):
        watch.progress("")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    write_progress(store, "m", "run", {"state": "running"})
    monkeypatch.setattr(time, "time", lambda: now + 600.0)
    assert math.isclose(watch.progress("").age_seconds, 600.0, abs_tol=1.0)
    with Lease(store, "reports/m", "jobs.eval.report"):
        assert watch.progress("").age_seconds == 0.0
