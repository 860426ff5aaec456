"""A training run shows a bar on a terminal and log events elsewhere, and always sets its metrics."""

import contextlib
import dataclasses
import fcntl
import logging
import math
import os
import re
import socket
import struct
import sys
import termios
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from jobs.progress import ProgressDisplay
from jobs.train.loop.metrics import peak_memory_bytes, serve_metrics
from jobs.train.loop.progress import Progress
from jobs.train.loop.step import StepReport
from jobs.train.loop.trackers import Tracker
from nanochat_core import logs
from nanochat_core.errors import UserError

STEP = StepReport(step=1, loss=2.0, seconds=0.5, data_wait_seconds=0.1, tokens=500, gradient_norm=0.75, lr_factor=0.5)


def at(step: int, **changes: Any) -> StepReport:
    return dataclasses.replace(STEP, step=step, **changes)


class Terminal:
    """A real terminal of a given size that replaces stderr."""

    def __init__(self, columns: int, rows: int) -> None:
        self._screen, keyboard = os.openpty()
        fcntl.ioctl(keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        os.set_blocking(self._screen, False)
        self.stream = open(keyboard, "w", encoding="utf-8")  # noqa: SIM115
        self._shown = b""

    def close(self) -> None:
        self.stream.flush()
        with contextlib.suppress(OSError):  # raised when all output has been read
            while chunk := os.read(self._screen, 65536):
                self._shown += chunk
        self.stream.close()
        os.close(self._screen)

    @property
    def text(self) -> str:
        """Everything that was written until the terminal was closed."""
        return self._shown.decode()

    @property
    def lines(self) -> list[str]:
        """All lines that were drawn until the terminal was closed, in order."""
        return [line.rstrip() for line in re.split(r"[\r\n]", self._shown.decode()) if line.strip()]


@contextlib.contextmanager
def terminal(columns: int = 80, rows: int = 24, level: int = logging.INFO) -> Iterator[Terminal]:
    log = logging.getLogger("jobs")
    with contextlib.closing(Terminal(columns, rows)) as screen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", screen.stream)
        log.setLevel(level)
        yield screen
    log.setLevel(logging.NOTSET)


class Recorder(Tracker):
    """A tracker that keeps all metrics."""

    def __init__(self) -> None:
        super().__init__("recorder", lambda step, metrics: self.noted.append((step, dict(metrics))), self.end)
        self.noted: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def end(self) -> None:
        self.closed = True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def events(caplog: pytest.LogCaptureFixture, name: str = "training") -> list[Any]:
    return [record for record in caplog.records if record.message == name]


def test_the_display_of_any_task_logs_an_event_every_few_seconds_and_at_the_end(
    caplog: pytest.LogCaptureFixture, clock: list[float]
) -> None:
    caplog.set_level(logging.INFO)
    with ProgressDisplay("task", 20, logging.getLogger("jobs.test"), "answering", done=4) as display:
        for done in range(5, 21):
            clock[0] += 1.0
            display.update(done, {"answered": done})
    assert [event.answered for event in events(caplog, "answering")] == [9, 14, 19, 20]


def test_the_display_of_any_task_is_a_bar_with_the_time_left_on_a_terminal(clock: list[float]) -> None:
    with terminal() as screen, ProgressDisplay("task", 20, logging.getLogger("jobs.test"), "answering") as display:
        for done in (5, 10, 20):
            clock[0] += 5.0
            display.update(done, {"answered": done})
    assert screen.lines[-1].startswith("task 100% ")
    assert screen.lines[-1].endswith("20/20  00:00 left")


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 24])
@pytest.mark.parametrize("columns", [0, 1, 80])
def test_a_terminal_that_does_not_know_its_size_has_a_bar_too(rows: int, columns: int, clock: list[float]) -> None:
    with terminal(columns, rows) as screen, Progress("base", total=10, initial=0) as shown:
        for step in range(1, 11):
            clock[0] += 1.0
            shown.report(at(step))
    assert screen.lines[0].startswith("base   0% ")
    assert screen.lines[-1].startswith("base 100% ")
    assert "10/10  loss 2.000" in screen.lines[-1]
    assert max(map(len, screen.lines)) <= 80


def test_a_terminal_shows_a_bar_with_what_matters_most_in_80_columns(clock: list[float]) -> None:
    with terminal() as screen, Progress("base", total=10, initial=4) as shown:
        shown.report(at(5))
        shown.held_out({"val_bpb": 1.5})
        for step in range(6, 11):
            clock[0] += 1.0
            shown.report(at(step))
    assert screen.lines[0].startswith("base  40% ")
    last = screen.lines[-1]
    for part in ("base 100%", "10/10", "loss 2.000", "1.00k tok/s", "00:00 left", "val_bpb 1.500"):
        assert part in last
    assert max(map(len, screen.lines)) <= 80


@given(columns=st.integers(20, 200), loss=st.floats(1e-3, 1e3), total=st.integers(2, 10**7))
def test_a_bar_is_never_longer_than_its_terminal_and_drops_the_least_wanted_first(
    columns: Any, loss: Any, total: Any
) -> None:
    def shown_in(width: int) -> list[str]:
        with terminal(width) as screen, Progress("base", total=total, initial=0) as shown:
            shown.held_out({"val_bpb": 1.5})
            shown.report(at(1, loss=loss, skipped=True))
        return screen.lines

    lines = shown_in(columns)
    # Even the narrowest bar shows the stage, the percentage and the count.
    assert max(map(len, lines)) <= max(columns, len(f"base 100% # {total:,}/{total:,}"))
    facts = ("loss", "tok/s", "val_bpb", "skipped", "wait", "GiB", "grad", "lr")
    present = [fact in lines[-1] for fact in facts]
    assert present == sorted(present, reverse=True)
    # No fact is dropped if there is room for all facts, a short bar and the cursor.
    everything = shown_in(400)[-1].split(f" 1/{total:,}")[1]
    assert all(present) or columns <= len(f"base 100% ###### 1/{total:,}{everything}")


def test_what_a_stage_measures_is_shown_logged_and_served(caplog: pytest.LogCaptureFixture) -> None:
    step = at(1, measures={"reward": 0.25})
    with terminal() as screen, Progress("rl-shown", total=10, initial=0) as shown:
        shown.report(step)
    assert "reward 0.250  loss 2.000" in screen.lines[-1]
    recorder = Recorder()
    with caplog.at_level(logging.INFO), Progress("rl-shown", total=10, initial=0, trackers=[recorder]) as shown:
        shown.report(step)
    assert events(caplog)[-1].reward == 0.25
    assert recorder.noted[0][1]["train/reward"] == 0.25
    labels = {"stage": "rl-shown", "measure": "reward"}
    assert REGISTRY.get_sample_value("nanochat_train_measure", labels) == 0.25


def test_a_warning_stands_above_the_bar_on_a_line_of_its_own() -> None:
    with terminal() as screen:
        logs.configure("test")
        with Progress("base", total=10, initial=0) as shown:
            shown.report(at(1))
            logging.getLogger("jobs.train").warning("step skipped", extra={"step": 1})
            shown.report(at(2))
    (line,) = [line for line in screen.lines if "step skipped" in line]
    assert line.endswith("warning: step skipped  step 1")
    assert not any("{" in line for line in screen.lines), "a person reads this, not a program"


def test_a_bar_disappears_where_the_program_that_started_this_one_reports_the_result(clock: list[float]) -> None:
    with terminal(level=logging.WARNING) as screen, Progress("base", total=2, initial=0) as shown:
        for step in (1, 2):
            clock[0] += 1.0
            shown.report(at(step))
    assert screen.text.endswith("\r")
    assert screen.text.rstrip("\r").rpartition("\r")[2].strip() == ""


def test_elsewhere_there_is_a_log_event_every_few_seconds_and_at_the_end(
    caplog: pytest.LogCaptureFixture, clock: list[float]
) -> None:
    caplog.set_level(logging.INFO)
    with Progress("base", total=100, initial=50, flops_per_token=1e3, peak_flops=4e6) as shown:
        for step in range(51, 101):
            clock[0] += 1.0
            shown.report(at(step))
    assert [event.step for event in events(caplog)] == [51, *range(56, 100, 5), 100]
    first = events(caplog)[0]
    assert (first.stage, first.steps, first.loss, first.tokens_per_second) == ("base", 100, 2.0, 1000)
    assert (first.mfu, first.data_wait_share, first.gradient_norm, first.lr_factor) == (0.25, 0.2, 0.75, 0.5)
    assert (first.skipped_steps, first.loss_spikes) == (0, 0)
    assert 0.01 < first.memory_gib < 1000


def test_the_time_left_is_told_by_the_steps_of_this_process_without_its_first(
    caplog: pytest.LogCaptureFixture, clock: list[float]
) -> None:
    caplog.set_level(logging.INFO)
    shown = Progress("base", total=100, initial=50)
    clock[0] += 30.0  # the first step compiles
    shown.report(at(51))
    for step in (52, 53):
        clock[0] += 6.0
        shown.report(at(step))
    assert [event.eta_seconds for event in events(caplog)] == [None, 48 * 6, 47 * 6]
    assert shown.eta_seconds == 47 * 6
    assert shown.tokens_per_second == pytest.approx(1000)


def test_losses_and_throughput_that_are_shown_are_moving_means(
    caplog: pytest.LogCaptureFixture, clock: list[float]
) -> None:
    caplog.set_level(logging.INFO)
    shown = Progress("base", total=2, initial=0)
    shown.report(at(1, loss=10.0, seconds=1.0, data_wait_seconds=0.0))
    shown.report(at(2, loss=0.0, seconds=3.0, data_wait_seconds=3.0))
    first, second = events(caplog)
    assert (first.loss, first.tokens_per_second, first.data_wait_share) == (10.0, 500, 0.0)
    # The newest step has weight 1, and the step before it has weight 0.9. The throughput is the weighted sum of tokens
    # divided by the weighted sum of seconds.
    assert second.loss == pytest.approx(9.0 / 1.9, abs=1e-4)
    assert second.tokens_per_second == round(950 / 3.9)
    assert second.data_wait_share == pytest.approx(3.0 / 3.9, abs=1e-4)


def test_skipped_steps_and_spikes_are_counted_and_a_loss_that_is_no_number_spoils_nothing(
    caplog: pytest.LogCaptureFixture, clock: list[float]
) -> None:
    caplog.set_level(logging.INFO)
    shown = Progress("skips", total=4, initial=0)
    shown.report(at(1))
    shown.report(at(2, loss=math.nan, gradient_norm=math.inf, skipped=True))
    shown.report(at(3, loss=9.0, spike=True))
    shown.report(at(4, loss=math.inf, skipped=True))
    last = events(caplog)[-1]
    assert (last.skipped_steps, last.loss_spikes) == (2, 1)
    assert 2.0 < last.loss < 9.0
    assert metric("loss", "skips") == 9.0
    assert metric("gradient_norm", "skips") == 0.75
    assert (metric("skipped_steps_total", "skips"), metric("loss_spikes_total", "skips")) == (2, 1)


def test_the_mfu_is_shown_only_where_it_is_known(caplog: pytest.LogCaptureFixture, clock: list[float]) -> None:
    caplog.set_level(logging.INFO)
    Progress("no_peak", total=1, initial=0, flops_per_token=1e3).report(at(1))
    assert not hasattr(events(caplog)[0], "mfu")
    assert metric("mfu", "no_peak") is None


def test_held_out_metrics_are_an_event_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    shown = Progress("sft", total=2, initial=0)
    shown.report(at(1))
    shown.held_out({"val_loss": 0.123456})
    (event,) = events(caplog, "held out")
    assert (event.step, event.val_loss) == (1, 0.1235)


def metric(name: str, stage: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"nanochat_train_{name}", {"stage": stage, **labels})


def test_metrics_count_steps_tokens_seconds_and_waiting(clock: list[float]) -> None:
    shown = Progress("counts", total=10, initial=0, flops_per_token=1e3, peak_flops=4e6)
    shown.report(at(1))
    clock[0] += 2.0
    shown.report(at(2, loss=3.0, tokens=100))
    shown.held_out({"val_bpb": 1.25})
    assert metric("loss", "counts") == 3.0
    assert metric("tokens_total", "counts") == 600
    assert metric("tokens_per_second", "counts") == 200.0
    assert metric("mfu", "counts") == pytest.approx(0.05)
    assert (metric("step_seconds_count", "counts"), metric("step_seconds_sum", "counts")) == (2, 1.0)
    assert metric("data_wait_seconds_total", "counts") == pytest.approx(0.2)
    assert (metric("step", "counts"), metric("steps", "counts"), metric("eta_seconds", "counts")) == (2, 10, 16)
    assert (metric("gradient_norm", "counts"), metric("lr_factor", "counts")) == (0.75, 0.5)
    assert metric("memory_bytes", "counts") > 2**20
    assert metric("held_out", "counts", metric="val_bpb") == 1.25


def test_trackers_are_told_every_step_as_it_was_and_closed_at_the_end() -> None:
    tracker = Recorder()
    with Progress("base", total=2, initial=0, trackers=[tracker]) as shown:
        shown.report(at(1))
        shown.report(at(2, loss=3.0, spike=True))
        shown.held_out({"val_bpb": 1.25})
        assert not tracker.closed
    assert tracker.closed
    (_, first), (_, second), held_out = tracker.noted
    assert (first["train/loss"], second["train/loss"]) == (2.0, 3.0)
    assert (first["train/tokens_per_second"], first["train/data_wait_share"]) == (1000.0, 0.2)
    assert (first["train/loss_spikes"], second["train/loss_spikes"]) == (0.0, 1.0)
    assert held_out == (2, {"held_out/val_bpb": 1.25})


def test_trackers_are_closed_when_the_run_fails() -> None:
    tracker = Recorder()
    with pytest.raises(RuntimeError), Progress("base", total=2, initial=0, trackers=[tracker]):
        raise RuntimeError("the run")
    assert tracker.closed


def test_only_the_rank_that_leads_says_anything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tracker = Recorder()
    with terminal() as screen, Progress("follower", total=1, initial=0, trackers=[tracker], shown=False) as shown:
        shown.report(at(1))
        shown.held_out({"val_bpb": 1.0})
    assert (caplog.records, screen.lines, tracker.noted) == ([], [], [])
    assert metric("loss", "follower") is None
    assert not tracker.closed


def test_peak_memory_grows_with_what_is_held_and_never_shrinks() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    held = bytearray(before)
    held[::4096] = b"x" * len(held[::4096])
    grown = peak_memory_bytes(torch.device("cpu"))
    assert grown > 1.3 * before
    del held
    assert peak_memory_bytes(torch.device("cpu")) >= grown


def test_metrics_are_served_and_a_taken_port_is_an_error() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve_metrics(port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        assert b"nanochat_train_loss" in response.read()
    with pytest.raises(UserError, match=f"--metrics-port {port} cannot be used"):
        serve_metrics(port)
