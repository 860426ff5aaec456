"""The engine service, but that it leaves a step to itself after a tenth of a second when it ends."""

from __future__ import annotations

import runpy

from nanochat_core.engine import async_engine

if __name__ == "__main__":
    async_engine.STOP_SECONDS = 0.1
    runpy.run_module("services.engine", run_name="__main__")
