"""The engine service with one difference: its shutdown waits only 0.1 seconds for a running step."""

import runpy

from nanochat_core.engine import async_engine

if __name__ == "__main__":
    async_engine.STOP_SECONDS = 0.1
    runpy.run_module("services.engine", run_name="__main__")
