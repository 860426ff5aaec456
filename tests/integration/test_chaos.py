"""Clients get their answers while services are killed, stopped and started. ``make chaos`` does so for longer."""

import pytest

from tests.benchmarks.chaos import print_report, run_chaos


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_clients_get_the_undisturbed_answers_and_only_documented_errors() -> None:
    report = await run_chaos(minutes=0.5, seed=1, clients=4, least=10)
    print_report(report)
    assert report.failures == []
    assert report.actions.total() >= 10
