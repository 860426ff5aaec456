"""The launcher starts the ranks of a pod, and ends with the exit code of the rank that failed first."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.train.cluster.pod import pod_environments
from jobs.train.launcher import Launcher
from nanochat_core.errors import UserError

ROOT = Path(__file__).parents[2]
POD = {"PET_NODE_RANK": "1", "PET_NNODES": "3", "PET_NPROC_PER_NODE": "2", "MASTER_ADDR": "first", "MASTER_PORT": "1"}
# A rank writes its environment and ends with the exit code that its argument gives for its local rank.
RANK = """
import json, os, pathlib, sys, time
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
local = int(os.environ["LOCAL_RANK"])
pathlib.Path(sys.argv[1], f"rank-{local}").write_text(json.dumps({name: os.environ[name] for name in names}))
if sys.argv[2] == "wait":
    time.sleep(60)
sys.exit(json.loads(sys.argv[2])[local])
"""


def start(folder: Path, codes: str) -> subprocess.Popen[str]:
    (folder / "rank.py").write_text(RANK)
    environment = {**os.environ, **POD, "PYTHONPATH": f"{folder}:{ROOT}"}
    command = [sys.executable, "-m", "jobs.train.cluster.pod", "rank", str(folder), codes]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_ranks_are_numbered_over_all_pods() -> None:
    assert pod_environments(POD) == [
        {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1"},
    ]


def test_the_address_of_a_train_job_has_another_name() -> None:
    pod = {"PET_NODE_RANK": "0", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}
    (rank,) = pod_environments(pod | {"PET_MASTER_ADDR": "first", "PET_MASTER_PORT": "29500"})
    assert (rank["MASTER_ADDR"], rank["MASTER_PORT"]) == ("first", "29500")


@pytest.mark.parametrize("environment", [{}, {**POD, "PET_NNODES": ""}, {**POD, "PET_NPROC_PER_NODE": "auto"}])
def test_an_environment_that_is_not_a_pods_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match="starts the ranks of a pod of a PyTorchJob"):
        pod_environments(environment)


@pytest.mark.parametrize(
    ("value", "problem"),
    [("auto", "is 'auto' and must be a whole number"), ("-1", "is '-1' and must"), ("", "is not set")],
)
def test_the_error_says_what_is_wrong_with_a_number(value: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"PET_NPROC_PER_NODE {problem}"):
        pod_environments({**POD, "PET_NPROC_PER_NODE": value})


@pytest.mark.parametrize(("codes", "code"), [([0, 0], 0), ([0, 7], 7), ([138, 138], 138)])
def test_the_exit_code_is_that_of_the_rank_that_failed(tmp_path: Path, codes: list[int], code: int) -> None:
    launcher = start(tmp_path, json.dumps(codes))
    assert launcher.wait(60) == code
    ranks = [json.loads((tmp_path / f"rank-{local}").read_text()) for local in (0, 1)]
    assert [rank["RANK"] for rank in ranks] == ["2", "3"]
    assert {rank["WORLD_SIZE"] for rank in ranks} == {"6"}
    assert {rank["MASTER_ADDR"] for rank in ranks} == {"first"}


def test_a_single_rank_that_a_rank_starts_gets_none_of_its_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5", "LOCAL_RANK": "1", "MASTER_ADDR": "first"}
    for name, value in (variables | {"MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "rank.py").write_text(RANK)
    assert Launcher().run([sys.executable, str(tmp_path / "rank.py"), str(tmp_path), "[0]"]) == 0
    assert json.loads((tmp_path / "rank-0").read_text()) == {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "",
    }  # fmt: skip


def test_a_pod_that_is_told_to_end_tells_its_ranks(tmp_path: Path) -> None:
    launcher = start(tmp_path, "wait")
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"rank-{local}").exists() for local in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == 128 + signal.SIGTERM
