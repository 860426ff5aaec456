"""The store has the newest progress of a training stage, and training never waits for the store."""

import math
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.train.loop import live
from jobs.train.loop.live import LiveProgress, story
from nanochat_core.formats import NewerFormatError
from nanochat_core.progress import read_progress, write_progress
from nanochat_core.store import FolderStore, Store, StoreError


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


def history(steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 10.0 / step} for step in range(1, steps + 1)]


def opened(store: Store, shown: bool = True) -> LiveProgress:
    return LiveProgress(store, "m", "base", steps=100, batch_tokens=512, program="jobs.train.pretrain", shown=shown)


def test_the_last_progress_is_in_the_store_when_the_stage_ends(store: FolderStore) -> None:
    with opened(store) as progress:
        progress.update(1, history(1), tokens_per_second=100.0, eta_seconds=math.nan)
        progress.update(100, history(100), tokens_per_second=123.44, eta_seconds=0.0, at_once=True)
    stored = read_progress(store, "m")["base"]
    assert (stored["step"], stored["steps"], stored["batch_tokens"]) == (100, 100, 512)
    assert (stored["tokens_per_second"], stored["eta_seconds"]) == (123.4, 0.0)
    assert stored["curve"][-1] == [100, 0.1]


def test_an_unknown_time_left_is_null(store: FolderStore) -> None:
    with opened(store) as progress:
        progress.update(1, history(1), tokens_per_second=math.nan, eta_seconds=math.nan)
    stored = read_progress(store, "m")["base"]
    assert (stored["tokens_per_second"], stored["eta_seconds"]) == (None, None)


def test_it_says_whether_the_next_step_compiles_the_model(store: FolderStore) -> None:
    told = []
    for compiling in (True, False):
        with opened(store) as progress:
            progress.update(0, [], tokens_per_second=math.nan, eta_seconds=math.nan, compiling=compiling)
        told.append(read_progress(store, "m")["base"]["compiling"])
    assert told == [True, False]


def test_it_is_written_every_few_seconds_or_at_once(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    progress = opened(store)
    given = {"tokens_per_second": 1.0, "eta_seconds": 1.0}
    updates = [(0.0, False, True), (0.5, False, False), (0.5, True, True), (2.1, False, True), (0.1, False, False)]
    for seconds, at_once, taken in updates:
        now[0] += seconds
        progress._newest = None
        progress.update(1, history(1), **given, at_once=at_once)
        assert (progress._newest is not None) == taken


def test_training_does_not_wait_for_a_slow_store_and_the_newest_progress_is_written_last(tmp_path: Path) -> None:
    class Slow(FolderStore):
        opened = threading.Event()
        written: list[str] = []  # noqa: RUF012

        def write(self, key: str, data: bytes) -> None:
            assert self.opened.wait(30)
            self.written.append(key)
            super().write(key, data)

    slow = Slow(tmp_path)
    with opened(slow) as progress:
        for step in range(1, 50):
            progress.update(step, history(step), tokens_per_second=1.0, eta_seconds=1.0, at_once=True)
        assert slow.written == []
        slow.opened.set()
    assert read_progress(slow, "m")["base"]["step"] == 49
    assert len(slow.written) <= 3, "older progress is left out"


def test_a_store_that_fails_does_not_end_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(FolderStore):
        failures = 1

        def write(self, key: str, data: bytes) -> None:
            if self.failures:
                self.failures -= 1
                raise StoreError("the disk is full")
            super().write(key, data)

    failing = Failing(tmp_path)
    with opened(failing) as progress:
        progress.update(1, history(1), tokens_per_second=1.0, eta_seconds=1.0)
        while not caplog.records:
            pass
        progress.update(2, history(2), tokens_per_second=1.0, eta_seconds=1.0, at_once=True)
    assert caplog.records[0].reason == "the disk is full"  # type: ignore[attr-defined]
    assert read_progress(failing, "m")["base"]["step"] == 2


def test_other_ranks_write_nothing(store: FolderStore) -> None:
    with opened(store, shown=False) as progress:
        progress.update(1, history(1), tokens_per_second=1.0, eta_seconds=1.0, at_once=True)
    assert read_progress(store, "m") == {}


@given(st.lists(st.floats(0.1, 20.0) | st.just(math.nan), max_size=1500))
def test_a_curve_is_short_and_has_the_mean_of_every_loss(losses: list[float]) -> None:
    points = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    curve = story(points)["curve"]
    finite = [(step, loss) for step, loss in enumerate(losses, 1) if math.isfinite(loss)]
    assert len(curve) <= 240
    assert [step for step, _ in curve] == sorted({step for step, _ in curve})
    assert bool(curve) == bool(finite)
    if finite:
        assert curve[-1][0] == finite[-1][0]
        assert min(loss for _, loss in finite) - 1e-3 <= min(loss for _, loss in curve)
        assert max(loss for _, loss in curve) <= max(loss for _, loss in finite) + 1e-3


def test_held_out_metrics_and_answers_are_told_with_their_steps() -> None:
    told = story(
        [
            {"step": 0, "answers": [("Who?", "grmpf")]},
            {"step": 1, "loss": 3.0, "gradient_norm": 1.0, "lr_factor": 0.1},
            {"step": 2, "loss": 2.0, "val_bpb": 1.23456, "samples": [["a", "b"]]},
            {"step": 3, "loss": 1.0, "val_loss": math.nan, "answers": [("Who?", "Me.")]},
            {
                "step": 4,
                "reward": 0.25,
                "heldout_reward": 0.5,
                "heldout_length": 7.25,
                "pass_at_k": {"1": 1 / 3, "8": 1.0},
            },
        ]
    )
    assert told["held_out"] == [
        {"step": 2, "val_bpb": 1.2346},
        {"step": 4, "heldout_reward": 0.5, "heldout_length": 7.25, "pass_at_k_1": 0.3333, "pass_at_k_8": 1.0},
    ]
    assert told["answers"] == [
        {"step": 0, "answers": [("Who?", "grmpf")]},
        {"step": 3, "answers": [("Who?", "Me.")]},
    ]


def test_a_damaged_file_is_left_out_and_a_newer_one_is_refused(store: FolderStore) -> None:
    write_progress(store, "m", "run", {"state": "running"})
    store.write("progress/m/base.json", b"{")
    assert list(read_progress(store, "m")) == ["run"]
    assert read_progress(store, "other") == {}
    store.write("progress/m/base.json", b'{"format": 99}')
    with pytest.raises(NewerFormatError):
        read_progress(store, "m")
