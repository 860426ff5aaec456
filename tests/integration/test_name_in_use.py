"""While a process trains a model, a second process is refused. After kill -9 of the first, the second takes over."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from nanochat_core.store import Lease
from tests.support.tiny_training import NAME, PRETRAIN, Jobs, OwnSignal, fill

MODULE = "jobs.train.pretrain"
LEASE = f"leases/models/{NAME}.json"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("prepared") / "home"
    fill(home)
    return home


@pytest.fixture
def jobs(prepared: Path, tmp_path: Path) -> Jobs:
    shutil.copytree(prepared, tmp_path / "home")
    (tmp_path / "logs").mkdir()
    return Jobs(tmp_path / "home", tmp_path / "logs")


def error_line(stderr: str) -> str:
    (line,) = [line for line in stderr.splitlines() if not line.startswith("{")]
    return line


def test_of_two_runs_one_trains_and_one_is_told_and_may_take_over_after_kill_9(jobs: Jobs) -> None:
    first = jobs.start(MODULE, PRETRAIN, steps=100_000, save_every=0)
    first.wait_until(lambda: any(event["event"] == "training" for event in first.events))
    second = jobs.start(MODULE, PRETRAIN)
    assert second.wait() == 2
    line = error_line(second.stderr)
    assert line.startswith(f"python -m {MODULE}: error: {MODULE} (process ")
    assert line.endswith(f"is writing models/{NAME} in {jobs.home}; wait until it has ended, or use another name")
    assert jobs.steps("base") == []
    first.signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert jobs.store.exists(LEASE)
    jobs.run(MODULE, PRETRAIN, steps=3)
    assert jobs.steps("base") == [1, 3]  # step 1 is the last step before the warmdown
    assert not (jobs.home / "leases").exists()


def test_a_run_whose_name_was_taken_over_ends_and_deletes_nothing(jobs: Jobs) -> None:
    """The first run is suspended, like a laptop that sleeps, while another machine takes over its lease."""
    # The delay is shorter than the hundred steps to the next checkpoint, so nothing is being written at that moment.
    suspended = OwnSignal(signal.SIGSTOP, jobs.saved("base", 100), delay=0.1)
    first = jobs.start(MODULE, PRETRAIN, own_signal=suspended, steps=100_000, save_every=100)
    first.wait_until(lambda: first.stopped)
    lease: dict[str, Any] = json.loads(jobs.store.read(LEASE))
    lease |= {"token": "another", "machine": "another", "program": "another", "pid": 1}
    jobs.store.write(LEASE, json.dumps(lease).encode())
    kept = jobs.steps("base")
    first.signal(signal.SIGCONT)
    assert first.wait() == 2
    assert f"another (process 1 on {lease['host']}) has taken over models/{NAME}" in error_line(first.stderr)
    assert jobs.steps("base") == kept
    assert json.loads(jobs.store.read(LEASE)) == lease


@pytest.mark.parametrize(
    ("name", "module", "flags"),
    [
        ("tokenizers/new", "jobs.train.tokenizer", {"dataset": NAME, "name": "new", "vocab-size": 300}),
        (f"reports/{NAME}", "jobs.eval.report", {"model": NAME}),
    ],
)
def test_other_writers_of_a_name_are_told_too(jobs: Jobs, name: str, module: str, flags: dict[str, Any]) -> None:
    with Lease(jobs.store, name, "another"):
        job = jobs.start(module, flags)
        assert job.wait() == 2
    assert f"error: another (process {os.getpid()} on" in error_line(job.stderr)
    assert f"is writing {name} in {jobs.home}" in error_line(job.stderr)


def test_the_lease_of_a_dead_program_on_another_machine_is_watched_and_then_taken_over(jobs: Jobs) -> None:
    dead = {"format": 1, "token": "another", "program": "another", "host": "elsewhere", "pid": 1, "seconds": 2.0}
    jobs.store.write("leases/tokenizers/new.json", json.dumps(dead).encode())
    job = jobs.run("jobs.train.tokenizer", {"dataset": NAME, "name": "new", "vocab-size": 300})
    assert any(event["event"].startswith("another program had this name") for event in job.events)
    assert any(event["event"] == "lease of a dead program taken over" for event in job.events)
    assert not jobs.store.exists("leases/tokenizers/new.json")
