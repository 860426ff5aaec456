"""Two processes that train one model name: one trains and the other is told; after kill -9 the other takes over."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_training import NAME, PRETRAIN, Jobs, fill

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
    assert jobs.steps("base") == [3]
    assert not (jobs.home / "leases").exists()


def test_a_run_whose_name_was_taken_over_ends_and_deletes_nothing(jobs: Jobs) -> None:
    """The first run is suspended, as a laptop that sleeps, while another machine takes over its lease."""
    first = jobs.start(MODULE, PRETRAIN, steps=100_000, save_every=4)
    first.wait_until(lambda: max(jobs.steps("base"), default=0) >= 8)
    first.signal(signal.SIGSTOP)
    lease: dict[str, Any] = json.loads(jobs.store.read(LEASE))
    lease |= {"token": "another", "machine": "another", "program": "another", "pid": 1}
    jobs.store.write(LEASE, json.dumps(lease).encode())
    kept = jobs.steps("base")
    first.signal(signal.SIGCONT)
    assert first.wait() == 2
    assert f"another (process 1 on {lease['host']}) has taken over models/{NAME}" in error_line(first.stderr)
    assert jobs.steps("base") == kept
    assert json.loads(jobs.store.read(LEASE)) == lease


def test_other_writers_of_a_name_are_told_too(jobs: Jobs, tmp_path: Path) -> None:
    other = {"format": 1, "token": "another", "program": "another", "host": "here", "pid": 1, "seconds": 2.0}
    (tmp_path / "book.txt").write_text("Some text.\n\n" * 50)
    writers: dict[str, tuple[str, dict[str, Any]]] = {
        "tokenizers/new": ("jobs.train.tokenizer", {"dataset": NAME, "name": "new", "vocab-size": 300}),
    }
    for name, (module, flags) in writers.items():
        # The holder of another machine is dead: its lease of two seconds is watched, and then taken over.
        jobs.store.write(f"leases/{name}.json", json.dumps(other).encode())
        job = jobs.run(module, flags)
        assert any(event["event"].startswith("another program had this name") for event in job.events)
        assert any(event["event"] == "lease of a dead program taken over" for event in job.events)
        assert not jobs.store.exists(f"leases/{name}.json")
