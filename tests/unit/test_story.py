"""A pipeline's story: one line per stage on a terminal, log events elsewhere, and the newest state in the store."""

import io
import logging
import re
import sys
from pathlib import Path

import pytest

from jobs.train.story import Story
from nanochat_core.errors import RetryableError, UserError
from nanochat_core.progress import read_progress, write_progress
from nanochat_core.store import FolderStore, StoreError

STAGES = ["data", "tokenizer", "base", "sft", "report"]


class Screen(io.StringIO):
    """A terminal that keeps what was written."""

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        """What a person sees in the end: each line without the text that was cleared."""
        return [re.split(r"\r\x1b\[K", line)[-1] for line in self.getvalue().split("\n") if line]


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


def terminal(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Makes a terminal of stderr. No fixture can do this, because pytest replaces stderr before each test's call."""
    made = Screen()
    monkeypatch.setattr(sys, "stderr", made)
    return made


def opened(store: FolderStore) -> Story:
    return Story(store, "m", "demo", STAGES)


def run_of(store: FolderStore) -> dict[str, object]:
    return read_progress(store, "m")["run"]


def test_each_stage_leaves_one_line_on_a_terminal(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    story = opened(store)
    with story.stage("tokenizer", "jobs.train.tokenizer"):
        pass
    with story.stage("base", "jobs.train.pretrain"):
        told = {"step": 320, "tokens_per_second": 12_000.0, "held_out": [{"step": 320, "val_bpb": 0.98765}]}
        write_progress(store, "m", "base", told)
    with story.stage("rl", "jobs.train.rl"):
        point = {"step": 9, "heldout_reward": 0.9, "heldout_length": 7.5, "pass_at_k_1": 0.5, "pass_at_k_8": 1.0}
        write_progress(store, "m", "rl", {"step": 9, "held_out": [point]})
    assert screen.lines == [
        "✓ tokenizer    00:00",
        "✓ pretraining  00:00  320 steps  12.0k tok/s  val_bpb 0.988",
        "✓ practice     00:00  9 steps  heldout_reward 0.900  heldout_length 7.500",
    ]


def test_a_stopped_stage_says_how_to_go_on(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    with pytest.raises(SystemExit), opened(store).stage("sft", "jobs.train.sft"):
        raise SystemExit(130)
    assert screen.lines == ["  fine-tuning stopped; the same command goes on from here"]
    assert run_of(store)["state"] == "stopped"


def test_a_failed_stage_says_so(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    with pytest.raises(SystemExit), opened(store).stage("sft", "jobs.train.sft"):
        raise SystemExit(2)
    assert screen.lines == ["✗ fine-tuning failed with exit code 2"]
    assert run_of(store)["state"] == "failed"


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (RetryableError("the API server does not answer"), "stopped"),
        (StoreError("the disk is full"), "failed"),
        (ValueError("a mistake"), "failed"),
        (UserError("another flag is needed"), "promoted"),
    ],
)
def test_an_error_of_the_pipeline_itself_says_whether_another_attempt_may_succeed(
    store: FolderStore, error: Exception, state: str
) -> None:
    write_progress(store, "m", "run", {"recipe": "demo", "state": "promoted"})
    with pytest.raises(type(error)), opened(store).stage("base", "jobs.train.pretrain"):
        raise error
    assert run_of(store)["state"] == state


def test_elsewhere_there_are_log_events(store: FolderStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    story = opened(store)
    with story.stage("data", "data"):
        pass
    with pytest.raises(SystemExit), story.stage("base", "jobs.train.pretrain"):
        raise SystemExit(3)
    assert [record.message for record in caplog.records] == [
        "stage starts",
        "stage done",
        "stage starts",
        "stage ended early",
    ]


def test_the_store_has_the_stage_that_runs_and_the_durations_of_the_finished_ones(store: FolderStore) -> None:
    story = opened(store)
    with story.stage("data", "data"):
        assert run_of(store)["state"] == "running"
    story.expect({"base": 1000})
    with story.stage("base", "jobs.train.pretrain"):
        run = run_of(store)
        assert (run["stage"], run["stages"], list(run["seconds"])) == ("base", STAGES, ["data"])  # type: ignore[call-overload]
        assert run["tokens"] == {"base": 1000}
    story.end("promoted")
    assert run_of(store)["state"] == "promoted"


def test_a_run_that_goes_on_keeps_the_durations_of_its_earlier_stages(store: FolderStore) -> None:
    with opened(store).stage("data", "data"):
        pass
    with pytest.raises(SystemExit), opened(store).stage("base", "jobs.train.pretrain"):
        raise SystemExit(143)
    with opened(store).stage("base", "jobs.train.pretrain"):
        pass
    assert list(run_of(store)["seconds"]) == ["data", "base"]  # type: ignore[call-overload]


def test_a_pipeline_with_nothing_to_do_changes_nothing(store: FolderStore) -> None:
    opened(store).end("promoted")
    assert read_progress(store, "m") == {}
