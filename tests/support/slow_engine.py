"""The engine service with one difference: each step takes at least 20 ms, so that a test can act while answers run.

A sampled answer of 100 tokens takes at least two seconds, and the processor is idle for most of this time.
"""

import runpy
import time

from nanochat_core.engine.backends.runner import EagerRunner
from nanochat_core.engine.scheduler import Chunk
from nanochat_core.engine.step import LaunchedStep

STEP_SECONDS = 0.02

if __name__ == "__main__":
    run = EagerRunner.run

    def run_slowly(runner: EagerRunner, chunks: list[Chunk], pending: LaunchedStep | None) -> object:
        time.sleep(STEP_SECONDS)
        return run(runner, chunks, pending)

    EagerRunner.run = run_slowly  # type: ignore[method-assign,assignment]
    runpy.run_module("services.engine", run_name="__main__")
