"""The command that checks and measures a GPU runs all its parts on a CPU, and goes on where it was cut off."""

import json
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from jobs.eval.gpu import GpuSettings, PartsFailed, Unfinished, run
from jobs.eval.gpu_parts.context import FULL, SMALL
from jobs.eval.gpu_parts.page import page
from jobs.eval.gpu_parts.parts import parts_of
from jobs.eval.gpu_parts.process import run_part
from nanochat_core.errors import UserError

ROOT = Path(__file__).parents[2]
NAMES = [part.name for part in parts_of(SMALL)]
TASK = {"device": "cpu", "scale": "small", "limits": None, "peer": "", "transformers": ""}


def settings(folder: Path, *parts: str, **changes: Any) -> GpuSettings:
    return GpuSettings(device="cpu", output=str(folder), parts=parts, **changes)


def document(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "cpu.json").read_text())
    return content


def processor_seconds() -> float:
    """Processor time of all ended processes that this process has started."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.timeout(1200)
def test_every_part_runs_on_a_cpu_in_five_minutes_of_processor_time(tmp_path: Path) -> None:
    """The processor time of the command and all its parts does not depend on what else the machine does."""
    command = [sys.executable, "-m", "jobs.eval.gpu", "--device", "cpu", "--output", str(tmp_path), "--minutes", "18"]
    before = processor_seconds()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert processor_seconds() - before < 300
    outcomes = document(tmp_path)["parts"]
    assert list(outcomes) == NAMES
    skipped = {name for name, outcome in outcomes.items() if outcome["status"] == "skipped"}
    # Nothing but the other projects is missing on this machine.
    assert skipped <= {name for name in NAMES if " beside " in name}
    text = (tmp_path / "cpu.md").read_text()
    assert all(f"| {name} | " in text for name in NAMES)
    assert "not run yet" not in text
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_is_cut_off_goes_on_where_it_stopped(tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(Unfinished, match="muon"):
        run(settings(tmp_path, "limits", "muon", minutes=0.01), lines.append)
    run(settings(tmp_path, "limits"), lines.append)
    first = document(tmp_path)["parts"]["limits"]
    assert first["status"] == "passed"
    run(settings(tmp_path, "limits", "muon"), lines.append)
    outcomes = document(tmp_path)["parts"]
    assert outcomes["limits"] == first
    assert outcomes["muon"]["status"] == "passed"
    assert [line.split()[0] for line in lines if " passed " in line] == ["limits", "muon"]


def test_outcomes_of_other_code_do_not_count(tmp_path: Path) -> None:
    run(settings(tmp_path, "muon"), lambda line: None)
    changed = document(tmp_path)
    changed["source"] = "before"
    changed["parts"]["muon"]["result"] = {}
    (tmp_path / "cpu.json").write_text(json.dumps(changed))
    lines: list[str] = []
    run(settings(tmp_path, "muon"), lines.append)
    assert "do not count" in lines[0]
    assert document(tmp_path)["parts"]["muon"]["result"]["products"]


def test_a_part_that_dies_has_failed_and_its_output_is_the_reason() -> None:
    outcome = run_part("no such part", TASK, 60)
    assert outcome is not None
    assert outcome["status"] == "failed"
    assert "StopIteration" in outcome["reason"]


def test_a_part_that_is_too_slow_is_ended() -> None:
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    before = set(children.read_text().split())
    assert run_part("limits", TASK, 0.3) is None
    assert set(children.read_text().split()) <= before


def test_a_failed_part_makes_the_command_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "jobs.eval.gpu.run_part", lambda *_: {"status": "failed", "reason": "it is broken", "seconds": 1.0}
    )
    with pytest.raises(PartsFailed, match="numerics") as caught:
        run(settings(tmp_path, "numerics"), lambda line: None)
    assert caught.value.exit_code == 1
    assert "it is broken" in (tmp_path / "cpu.md").read_text()


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose from limits"):
        run(settings(tmp_path, "everything"), lambda line: None)


def test_the_page_of_a_verdict_that_has_no_part_yet() -> None:
    names = [part.name for part in parts_of(FULL)]
    empty = {"card": "H200", "machine": {"torch": "2.9", "cores": 1}, "scale": "full", "source": "", "parts": {}}
    assert page(empty, names, "").count("not run yet") == len(names)


_ABSENT = """
fastapi rustbpe redis matplotlib hypothesis boto3 botocore httpx llguidance pydantic yaml uvicorn xdist
"""
_IMPORTS = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import jobs.eval.gpu, jobs.eval.gpu_parts.process
import tests.benchmarks.our_engine_process, tests.benchmarks.our_process, tests.benchmarks.bench_train_peer
import tests.benchmarks.bench_engine_peer, tests.benchmarks.bench_engine_transformers
"""


def test_the_command_imports_few_packages() -> None:
    """A machine with a GPU may have no package index, and only torch and what the core needs."""
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTS, *_ABSENT.split()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
