"""Runs a part of ``jobs.eval.gpu`` in its own process, so that a crash, a hang or a lack of memory ends only this part.

:func:`run_part` starts this module as a program. The program reads its task from the file that its argument names, and
replaces the task by the outcome.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from jobs.eval.bench.roofline import Limits
from jobs.eval.gpu_parts.context import FULL, SMALL, Context, Result, Unavailable
from jobs.eval.gpu_parts.parts import parts_of
from nanochat_core.device import prepare_cpu

ROOT = Path(__file__).parents[3]
_REASON_CHARACTERS = 4000


def run_part(name: str, task: dict[str, Any], seconds: float) -> Result | None:
    """Run the part ``name`` and return its outcome; None if it did not end within ``seconds``.

    An outcome has a ``status``: ``passed`` with a ``result``, or ``skipped`` or ``failed`` with a ``reason``.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "part.json")
        path.write_text(json.dumps({"part": name, **task}))
        with Path(folder, "output").open("w+") as output:
            # The part may start processes itself, so it gets a process group, which can be ended as a whole.
            process = subprocess.Popen(  # noqa: S603 - this module builds the command
                [sys.executable, "-m", __name__, str(path)],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            output.seek(0)
            said = output.read()
        outcome: Result = json.loads(path.read_text())
        if "status" not in outcome:
            outcome = {"status": "failed", "reason": f"the process ended with {code}:\n{said[-_REASON_CHARACTERS:]}"}
    return outcome | {"seconds": time.monotonic() - started}


def outcome_of(task: dict[str, Any]) -> Result:
    """In this process, run the part that ``task`` names. Returns the outcome as :func:`run_part` describes it."""
    scale = FULL if task["scale"] == "full" else SMALL
    limits = Limits(**task["limits"]) if task["limits"] else None
    peer, transformers = (Path(task[name]) if task[name] else None for name in ("peer", "transformers"))
    context = Context(torch.device(task["device"]), scale, limits, peer, transformers)
    part = next(part for part in parts_of(scale) if part.name == task["part"])
    try:
        return {"status": "passed", "result": part.measure(context)}
    except Unavailable as error:
        return {"status": "skipped", "reason": str(error)}
    except Exception as error:  # a part may raise any error, which is then its outcome
        trace = "".join(traceback.format_exception(error))
        return {"status": "failed", "reason": trace[-_REASON_CHARACTERS:]}


def main() -> None:
    path = Path(sys.argv[1])
    prepare_cpu(0)
    path.write_text(json.dumps(outcome_of(json.loads(path.read_text()))))


if __name__ == "__main__":
    main()
