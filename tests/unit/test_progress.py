"""A run shows a bar on a terminal, log events elsewhere, and always metrics."""

from __future__ import annotations

import io
import logging
import socket
import sys
import urllib.request

import pytest
from prometheus_client import REGISTRY

from jobs.train import progress
from jobs.train.progress import Progress, TrainMetrics, serve_metrics
from nanochat_core.errors import UserError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_terminal_shows_a_bar_with_loss_throughput_and_held_out_metrics(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("base", total=10, initial=4) as shown:
        shown.update(5, 2.0, 1234.0)
        shown.note({"val_bpb": 1.5})
        for step in range(6, 11):
            shown.update(step, 2.0, 1234.0)
    last = terminal.getvalue().split("\r")[-1]
    assert "10/10" in last
    for part in ("base", "loss=2.000", "tok/s=1,234", "val_bpb=1.500"):
        assert part in last


def test_elsewhere_there_is_a_log_event_every_few_seconds_and_at_the_end(caplog, clock):
    caplog.set_level(logging.INFO)
    with Progress("base", total=100, initial=50) as shown:
        for step in range(51, 101):
            clock[0] += 1.0
            shown.update(step, 1.0, 500.4)
    events = [record for record in caplog.records if record.message == "training"]
    assert [event.step for event in events] == [51, *range(56, 100, 5), 100]
    first = events[0]
    assert (first.stage, first.steps, first.loss, first.tokens_per_second) == ("base", 100, 1.0, 500)
    # Only the steps of this process say how fast it is.
    assert (first.eta_seconds, events[1].eta_seconds, events[-1].eta_seconds) == (49, 44, 0)


def test_the_loss_that_is_shown_is_smoothed(caplog, clock):
    caplog.set_level(logging.INFO)
    shown = Progress("base", total=2, initial=0)
    shown.update(1, 10.0, 1.0)
    shown.update(2, 0.0, 1.0)
    assert [record.loss for record in caplog.records] == [10.0, 9.0]


def test_held_out_metrics_are_an_event_of_their_own(caplog):
    caplog.set_level(logging.INFO)
    Progress("sft", total=2, initial=0).note({"val_loss": 0.123456})
    assert (caplog.records[0].message, caplog.records[0].val_loss) == ("held out", 0.1235)


def metric(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"nanochat_train_{name}", {"stage": "test", **labels})


def test_metrics_count_tokens_seconds_and_waiting():
    metrics = TrainMetrics("test")
    metrics.step(loss=3.0, seconds=0.5, waited=0.1, tokens_per_second=200.0)
    metrics.step(loss=2.0, seconds=0.5, waited=0.1, tokens_per_second=100.0)
    metrics.held_out({"val_bpb": 1.25})
    assert metric("loss") == 2.0
    assert metric("tokens_total") == pytest.approx(150)
    assert metric("tokens_per_second") == 100.0
    assert (metric("step_seconds_count"), metric("step_seconds_sum")) == (2, 1.0)
    assert metric("data_wait_seconds_total") == pytest.approx(0.2)
    assert metric("held_out", metric="val_bpb") == 1.25


def test_metrics_are_served_and_a_taken_port_is_an_error():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve_metrics(port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        assert b"nanochat_train_loss" in response.read()
    with pytest.raises(UserError, match=f"--metrics-port {port} cannot be used"):
        serve_metrics(port)
