"""Trackers receive every metric; their failures neither end a run nor reveal a secret."""

import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from jobs.train.loop.trackers import Tracker, open_trackers
from nanochat_core.errors import UserError

KEY = "0123456789abcdef0123456789abcdef01234567"


class FakeRun:
    def __init__(self, **given: Any) -> None:
        self.given, self.finished = given, False
        self.logged: list[Any] = []
        self.metrics: list[Any] = []
        self.url = "https://wandb.example/run"
        self.error: Exception | None = None

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, float]) -> None:
        if self.error:
            raise self.error
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


class FakeWriter:
    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.scalars: list[Any] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A replacement for the package ``wandb``.

    ``runs`` has the started runs. If ``error`` is set, ``init`` raises it.
    """
    module = types.ModuleType("wandb")
    module.runs, module.error = [], None
    module.Settings = dict

    def init(**given: Any) -> FakeRun:
        if module.error:
            raise module.error
        module.runs.append(FakeRun(**given))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> list[FakeWriter]:
    """The writers that a replacement for ``torch.utils.tensorboard`` has created."""
    writers: list[FakeWriter] = []

    def make(folder: str, purge_step: int) -> FakeWriter:
        writers.append(FakeWriter(folder, purge_step))
        return writers[-1]

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = make
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return writers


def opened(folder: Path, *names: str, step: int = 0, **config: Any) -> list[Tracker]:
    return open_trackers(names, model="tiny", stage="base", folder=folder, config=config, step=step)


def test_without_names_there_is_no_tracker(tmp_path: Path) -> None:
    assert opened(tmp_path) == []


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
@pytest.mark.parametrize("step", [0, 7])
def test_a_missing_package_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, step: int
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # imports fail as if the package were not installed
    with pytest.raises(UserError, match=f"--track {name} needs the package {name}; run: pip install {name}"):
        opened(tmp_path, name, step=step)


def test_an_unknown_tracker_is_refused_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--track has no 'mlflow'; choose from tensorboard, wandb"):
        opened(tmp_path, "mlflow")


def test_tensorboard_gets_every_number_and_hides_the_steps_that_are_done_again(
    tmp_path: Path, tensorboard: list[FakeWriter]
) -> None:
    (tracker,) = opened(tmp_path, "tensorboard", step=40)
    tracker.log(41, {"train/loss": 2.0, "train/mfu": 0.4})
    tracker.close()
    (writer,) = tensorboard
    assert (writer.folder, writer.purge_step) == (str(tmp_path / "tiny/base"), 41)
    assert writer.scalars == [("train/loss", 2.0, 41), ("train/mfu", 0.4, 41)]
    assert writer.closed


def test_wandb_gets_every_number_under_the_run_s_own_steps(tmp_path: Path, wandb: types.ModuleType) -> None:
    (tracker,) = opened(tmp_path, "wandb", depth=4)
    tracker.log(3, {"train/loss": 2.0})
    tracker.close()
    (run,) = wandb.runs
    assert (run.given["project"], run.given["name"], run.given["config"]) == ("nanochat", "tiny/base", {"depth": 4})
    assert run.metrics == [("*", "step")]
    assert run.logged == [{"step": 3, "train/loss": 2.0}]
    assert run.finished


def test_a_restarted_run_is_the_same_one_on_wandb_and_other_settings_are_another(
    tmp_path: Path, wandb: types.ModuleType
) -> None:
    for config in ({"depth": 4}, {"depth": 4}, {"depth": 6}):
        opened(tmp_path, "wandb", **config)
    first, again, other = (run.given["id"] for run in wandb.runs)
    assert first == again != other
    assert wandb.runs[1].given["resume"] == "allow"


def test_the_project_on_wandb_can_be_chosen(
    tmp_path: Path, wandb: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    opened(tmp_path, "wandb")
    assert wandb.runs[0].given["project"] == "mine"


def test_a_tracker_that_cannot_be_opened_is_an_error_at_the_start_of_a_run(
    tmp_path: Path, wandb: types.ModuleType
) -> None:
    wandb.error = RuntimeError(f"no\nlogin with {KEY}")
    with pytest.raises(UserError) as caught:
        opened(tmp_path, "wandb")
    assert str(caught.value) == "--track wandb cannot be opened: no login with ***"


def test_a_run_that_is_resumed_goes_on_without_a_tracker_that_cannot_be_opened(
    tmp_path: Path, wandb: types.ModuleType, tensorboard: list[FakeWriter], caplog: pytest.LogCaptureFixture
) -> None:
    wandb.error = OSError("no route to host")
    (tracker,) = opened(tmp_path, "wandb", "tensorboard", step=40)
    tracker.log(41, {"train/loss": 2.0})
    assert tensorboard[0].scalars == [("train/loss", 2.0, 41)]
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert (warning.tracker, warning.reason) == ("wandb", "no route to host")


def test_a_tracker_that_fails_is_named_once_and_left_alone_while_others_go_on(
    tmp_path: Path, wandb: types.ModuleType, tensorboard: list[FakeWriter], caplog: pytest.LogCaptureFixture
) -> None:
    failing, whole = opened(tmp_path, "wandb", "tensorboard")
    wandb.runs[0].error = ConnectionError(f"key {KEY} was refused")
    for step in (1, 2, 3):
        for tracker in (failing, whole):
            tracker.log(step, {"train/loss": 2.0})
    for tracker in (failing, whole):
        tracker.close()
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert (warning.tracker, warning.reason) == ("wandb", "key *** was refused")
    assert not wandb.runs[0].finished
    assert len(tensorboard[0].scalars) == 3
    assert tensorboard[0].closed


def test_a_key_is_neither_logged_nor_sent_as_a_setting(
    tmp_path: Path, wandb: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    (tracker,) = opened(tmp_path, "wandb", depth=4)
    tracker.log(1, {"train/loss": 2.0})
    tracker.close()
    assert KEY not in str([vars(record) for record in caplog.records])
    assert KEY not in str(wandb.runs[0].given)


def test_event_files_of_tensorboard_can_be_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, stop in ((0, 6), (4, 8)):  # A run stops after step 6 and resumes from the checkpoint of step 4.
        (tracker,) = opened(tmp_path, "tensorboard", step=start)
        for step in range(start + 1, stop + 1):
            tracker.log(step, {"train/loss": 10.0 * start + step})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tiny/base"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 45.0), (6, 46.0), (7, 47.0), (8, 48.0)]
