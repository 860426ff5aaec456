"""A study of tiny models: each run is a process, no run is trained twice, and failed runs are named."""

import csv
import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.train import launcher, scaling
from nanochat_core.errors import UserError
from nanochat_core.settings import load
from nanochat_core.store import Store, open_store
from tests.support.tiny_training import NAME, Jobs, argv, damage, fill

PASSED_ON = argv(
    {
        "head-dim": 16,
        "context-length": 32,
        "batch-tokens": 256,
        "weight-decay": 0.1,
        "eval-every": 0,
        "eval-tokens": 500,
        "threads": 1,
        "no-compile": True,
    }
)
STEPS = ["--steps=3"]


class Studies:
    """Runs studies in this process, and forks the processes of their runs."""

    def __init__(self, home: Path, logs: Path) -> None:
        self.home, self.logs = home, logs
        self.trained: list[str] = []
        # Processes that replace the training of some models, by model name.
        self.instead: dict[str, Any] = {}

    @property
    def store(self) -> Store:
        return open_store(str(self.home))

    def run(self, kind: str, passed_on: list[str] = [], **flags: str) -> None:  # noqa: B006
        given = {"home": self.home, "dataset": NAME, "tokenizer": NAME, **flags}
        settings = load(scaling.STUDIES[kind], prefix="TEST", program="test", argv=argv(given))
        scaling.run_study(settings, [*PASSED_ON, *passed_on], f"repeat {kind}")

    def popen(self, command: list[str], env: dict[str, str], process_group: int) -> Any:
        assert process_group == 0, "Ctrl-C does not reach the jobs"
        _python, _m, module, *arguments = command
        flags = {name: value or True for name, _, value in (word[2:].partition("=") for word in arguments)}
        assert flags.pop("home") == str(self.home)
        self.trained.append(flags["model"])
        return self.instead.get(flags["model"]) or Jobs(self.home, self.logs).start(module, flags, environment=env)

    def report(self, study: str) -> dict[str, Any]:
        return json.loads(self.store.read(f"reports/{study}/report.json"))


class Ended:
    """Replaces a process: runs an action in this process and then reports an exit code."""

    def __init__(self, code: int, first: Any = lambda: None) -> None:
        self._code, self._first = code, first
        self.signals: list[int] = []

    def wait(self, timeout: float | None = None) -> int:
        self._first()
        return self._code

    def send_signal(self, number: int) -> None:
        self.signals.append(number)


@pytest.fixture
def studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studies]:
    fill(tmp_path / "home")
    (tmp_path / "logs").mkdir()
    made = Studies(tmp_path / "home", tmp_path / "logs")
    monkeypatch.setattr(launcher.subprocess, "Popen", made.popen)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_miniseries_trains_each_depth_and_reports_what_the_checkpoints_say(studies: Studies) -> None:
    studies.run("miniseries", STEPS, depths="2,1,3")
    assert studies.trained == ["miniseries-d1", "miniseries-d2", "miniseries-d3"]
    report = studies.report("miniseries")
    assert (report["command"], report["failed"], report["missing"]) == ("repeat miniseries", [], 0)
    assert [(run["depth"], run["dim"]) for run in report["runs"]] == [(1, 64), (2, 128), (3, 192)]
    for run in report["runs"]:
        *_, key = [key for key in studies.store.keys(f"models/{run['model']}/base") if key.endswith("meta.json")]
        meta = json.loads(studies.store.read(key))
        assert run["val_bpb"] == meta["history"][-1]["val_bpb"]
        assert (run["tokens"], run["parameters"]) == (3 * 256, meta["parameters"])
        assert run["flops"] == run["tokens"] * meta["flops_per_token"]
        assert run["seconds"] == meta["train_seconds"]
    rows = list(csv.DictReader(io.StringIO(studies.store.read("reports/miniseries/table.csv").decode())))
    assert [row["depth"] for row in rows] == ["1", "2", "3"]


def test_laws_train_each_depth_on_each_budget_and_come_near_to_it(studies: Studies) -> None:
    studies.run("laws", depths="1,2", flops="3e9,1.5e9", study="mine")
    assert studies.trained == ["mine-1.5e9-d1", "mine-1.5e9-d2", "mine-3e9-d1", "mine-3e9-d2"]
    runs = studies.report("mine")["runs"]
    assert [run["budget"] for run in runs] == [1.5e9, 1.5e9, 3e9, 3e9]
    for run in runs:
        # The number of steps is an integer, so the run can miss the budget by up to half a step.
        assert abs(run["flops"] / run["budget"] - 1) <= 0.5 / run["steps"] + 1e-9
    assert "fewer than 3 depths" in studies.store.read("reports/mine/report.md").decode()


def test_started_again_it_trains_only_what_is_missing_or_damaged(studies: Studies) -> None:
    studies.run("miniseries", STEPS, depths="1,2")
    first = studies.report("miniseries")["runs"]
    studies.trained.clear()
    studies.run("miniseries", STEPS, depths="1,2")
    assert (studies.trained, studies.report("miniseries")["runs"]) == ([], first)
    studies.run("miniseries", STEPS, depths="1,2,3")
    assert studies.trained == ["miniseries-d3"]
    damage(studies.home / "models/miniseries-d2/base/step_000003/meta.json")
    studies.run("miniseries", STEPS, depths="1,2,3")
    assert studies.trained == ["miniseries-d3", "miniseries-d2"]
    assert [run["val_bpb"] for run in studies.report("miniseries")["runs"]][:2] == [run["val_bpb"] for run in first]


def test_a_run_that_fails_is_named_the_others_go_on_and_it_is_tried_again(studies: Studies) -> None:
    studies.instead = {"miniseries-d1": Ended(-signal.SIGKILL)}
    with pytest.raises(SystemExit) as ended:
        studies.run("miniseries", STEPS, depths="1,2")
    assert ended.value.code == 1
    report = studies.report("miniseries")
    assert report["failed"] == [{"model": "miniseries-d1", "exit_code": 137}]
    assert [run["depth"] for run in report["runs"]] == [2]
    studies.instead.clear()
    studies.run("miniseries", STEPS, depths="1,2")
    assert studies.trained == ["miniseries-d1", "miniseries-d2", "miniseries-d1"]
    assert studies.report("miniseries")["failed"] == []


def test_when_every_run_fails_there_is_an_error_and_no_report(studies: Studies) -> None:
    studies.instead = {"miniseries-d1": Ended(2), "miniseries-d2": Ended(2)}
    with pytest.raises(UserError, match="every run failed"):
        studies.run("miniseries", STEPS, depths="1,2")
    assert studies.store.keys("reports") == []


def test_sigterm_reaches_the_run_and_ends_the_study(studies: Studies) -> None:
    stopped = Ended(128 + signal.SIGTERM, lambda: os.kill(os.getpid(), signal.SIGTERM))
    studies.instead = {"miniseries-d1": stopped}
    with pytest.raises(SystemExit) as ended:
        studies.run("miniseries", STEPS, depths="1,2")
    assert ended.value.code == 128 + signal.SIGTERM
    assert stopped.signals == [signal.SIGTERM]
    assert studies.trained == ["miniseries-d1"]


def test_models_that_were_trained_otherwise_are_refused_before_anything_is_trained(studies: Studies) -> None:
    studies.run("miniseries", STEPS, depths="1")
    with pytest.raises(UserError, match=r"models/miniseries-d1 .* \(steps 3 -> 4\); use another --study name"):
        studies.run("miniseries", ["--steps=4"], depths="1,2")
    assert studies.trained == ["miniseries-d1"]


def test_a_study_that_a_newer_version_reported_is_refused_before_anything_is_trained(studies: Studies) -> None:
    newer = b'{"format": 2}'
    studies.store.write("reports/miniseries/report.json", newer)
    with pytest.raises(UserError, match=r"reports/miniseries/report\.json has format 2.* a newer version of nanochat"):
        studies.run("miniseries", STEPS, depths="1")
    assert studies.trained == []
    assert studies.store.read("reports/miniseries/report.json") == newer


@pytest.mark.parametrize(
    ("kind", "flags", "passed_on", "message"),
    [
        ("miniseries", {"depths": "4,x"}, [], "--depths is '4,x'; give different positive whole numbers"),
        ("miniseries", {"depths": "4,4"}, [], "give different positive whole numbers"),
        ("miniseries", {"depths": "0"}, [], "give different positive whole numbers"),
        ("laws", {"depths": "1", "flops": "nan"}, [], "--flops is 'nan'; give different positive numbers"),
        ("laws", {"depths": "1", "flops": "1e9"}, ["--steps=4"], "--steps is set by the study"),
        ("miniseries", {"depths": "1"}, ["--depth", "3"], "--depth is set by the study for every run"),
        ("miniseries", {"depths": "1"}, ["--start-from=x"], "from random weights; leave --start-from out"),
        ("miniseries", {"depths": "1"}, ["--ratio=x"], "--ratio is 'x', which is not a number"),
        ("laws", {"depths": "1,2", "flops": "1"}, [], "the horizon is shorter than one batch"),
        ("miniseries", {"depths": "1", "study": "a b"}, [], "'a b' cannot name a model"),
        ("miniseries", {"depths": "1", "tokenizer": "other"}, [], "other"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_anything_is_trained(
    studies: Studies, kind: str, flags: Any, passed_on: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        studies.run(kind, passed_on, **flags)
    assert studies.trained == []
    assert not (studies.home / "models").exists()


def test_a_wrong_flag_makes_no_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--depths"):
        Studies(tmp_path / "new", tmp_path).run("miniseries", depths="x")
    assert not (tmp_path / "new").exists()


def test_several_ranks_are_told_where_to_meet(studies: Studies, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def popen(command: list[str], env: dict[str, str], process_group: int) -> Ended:
        assert process_group == 0
        assert "--model=miniseries-d1" in command
        started.append({name: env[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")})
        return Ended(1)

    monkeypatch.setattr(launcher.subprocess, "Popen", popen)
    with pytest.raises(UserError):
        studies.run("miniseries", STEPS, depths="1", ranks="2")
    assert [(env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) for env in started] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert len({(env["MASTER_ADDR"], env["MASTER_PORT"]) for env in started}) == 1


def test_help_lists_the_studies(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["scaling", "--help"])
    scaling.main()
    usage, _, *studies = capsys.readouterr().out.splitlines()
    assert usage.startswith("usage: python -m jobs.train.scaling COMMAND [FLAGS]")
    assert [line.split()[0] for line in studies] == list(scaling.STUDIES)
