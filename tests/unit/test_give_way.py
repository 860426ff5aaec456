"""A process that gives way gets hardly any processor time while another process wants the same core."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from jobs.teach.runners import give_way
from tests.support.processes import stat_fields

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="only Linux has SCHED_IDLE")

COMPUTE = "while True: pass"


@pytest.fixture
def pair() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes that compute all the time on the same core."""
    core = min(os.sched_getaffinity(0))
    processes = [subprocess.Popen([sys.executable, "-c", COMPUTE]) for _ in range(2)]
    for process in processes:
        os.sched_setaffinity(process.pid, {core})
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def processor_ticks(process: subprocess.Popen[bytes]) -> int:
    """Processor time of a process in user mode, in clock ticks."""
    return int(stat_fields(process.pid)[11])


def test_a_process_that_gives_way_leaves_the_core_to_the_other_one(pair: list[subprocess.Popen[bytes]]) -> None:
    yielding, other = pair
    give_way(yielding)
    before = [processor_ticks(yielding), processor_ticks(other)]
    while processor_ticks(other) - before[1] < 50:
        time.sleep(0.05)
    assert processor_ticks(yielding) - before[0] <= 5
