"""Check and measure a GPU in one command: ``python -m jobs.eval.gpu``.

The command needs torch with Triton, the packages of ``nanochat_core`` and, for the tests, pytest; it needs no network.
Every part of the check runs in a process of its own, and its outcome is written at once. The outcomes of all parts are
the verdict on the GPU. If the command is cut off, the next run repeats only the parts that have not passed yet.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jobs.eval.gpu_parts.context import FULL, SMALL
from jobs.eval.gpu_parts.page import Document, page, plot_verdict
from jobs.eval.gpu_parts.parts import Part, parts_of
from jobs.eval.gpu_parts.process import ROOT, run_part
from jobs.measures.machine import describe_machine
from jobs.program import JobSettings, make_output_folder, run_program
from nanochat_core.device import choose_device
from nanochat_core.errors import UserError
from nanochat_core.formats import with_format, without_format
from nanochat_core.paths import user_path
from nanochat_core.settings import setting

RESULT_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuSettings(JobSettings):
    """Check this GPU's results and measure its speed. If a run is cut off, the next run goes on from there."""

    device: Literal["cuda", "cpu"] = setting("cuda", "device to check; cpu runs every part with tiny models")
    output: str = setting("docs/gpu", "folder for <card>.json, <card>.md and <card>.png")
    minutes: float = setting(8.0, "minutes after which no part starts or goes on", minimum=0.01)
    parts: tuple[str, ...] = setting((), "parts to run, comma separated; empty for all")
    again: bool = setting(False, "run also the parts that have passed")
    peer: str = setting("", "checkout of karpathy/nanochat to compare with")
    transformers: str = setting("", "folder with the package transformers; empty uses the installed package")


class PartsFailed(UserError):
    """Some parts of the check failed."""

    exit_code = 1


class Unfinished(UserError):
    """The time limit passed before all chosen parts of the check had run."""

    exit_code = 3


def run(settings: GpuSettings, show: Callable[[str], None]) -> Document:
    """Run the chosen parts that have not passed yet, or with ``--again`` all chosen parts.

    The JSON file and the page are written after each part, and the plot after each measurement of inference.

    Raises:
        UserError: a setting is wrong, for example the name of a part.
        PartsFailed: at least one of the chosen parts failed, in this run or an earlier one.
        Unfinished: none of them failed, but the time limit passed before all of them had run.
    """
    device = choose_device(settings.device)
    scale = FULL if device.type == "cuda" else SMALL
    every = parts_of(scale)
    names = [part.name for part in every]
    if unknown := set(settings.parts) - set(names):
        raise UserError(f"--parts has {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    chosen = [part for part in every if not settings.parts or part.name in settings.parts]
    machine = describe_machine()
    card = machine["processor"] if device.type == "cuda" else "CPU"
    header = {
        "card": card,
        "machine": machine,
        "scale": "full" if scale is FULL else "small",
        "source": source_digest(),
    }
    verdict = Verdict(make_output_folder(settings.output, "--output"), header, names)
    peers = {"peer": _absolute(settings.peer), "transformers": _absolute(settings.transformers) or _installed()}
    if verdict.outdated:
        show("the earlier outcomes do not count, because the machine, torch or the source code has changed")
    until = time.monotonic() + 60 * settings.minutes
    for part in chosen:
        if not settings.again and verdict.has_passed(part.name):
            continue
        task = {"device": device.type, "scale": header["scale"], "limits": verdict.limits, **peers}
        outcome = _outcome(part, task, until - time.monotonic())
        if outcome is None:
            break
        verdict.add(part.name, outcome)
        show(f"{part.name:36} {outcome['status']:8} {outcome['seconds']:6.1f} s")
        if outcome["status"] != "passed":
            show(f"    {outcome['reason'].strip().splitlines()[-1]}")
    show(f"written to {verdict.path}")
    outcomes = {part.name: verdict.document["parts"].get(part.name) for part in chosen}
    if failed := [name for name, outcome in outcomes.items() if outcome and outcome["status"] == "failed"]:
        raise PartsFailed(f"failed: {', '.join(failed)}; see {verdict.path}")
    if left := [name for name, outcome in outcomes.items() if outcome is None]:
        raise Unfinished(f"not run yet: {', '.join(left)}; run the command again to go on")
    return verdict.document


def _outcome(part: Part, task: dict[str, Any], left: float) -> dict[str, Any] | None:
    """Run a part for at most ``left`` seconds. Returns None if this time is over before the part's own time limit."""
    if left <= 0:
        return None
    outcome = run_part(part.name, task, min(left, part.seconds))
    if outcome is None and left >= part.seconds:
        return {"status": "failed", "reason": f"it takes longer than {part.seconds:g} s", "seconds": part.seconds}
    return outcome


class Verdict:
    """The outcomes of all parts, and their files: a page, a plot, and ``<card>.json``, which a later run reads.

    Outcomes of an earlier run count if the card, the number of CPU cores, the version of torch, the scale and the
    source code are the same. Parts that failed or were skipped run again.
    """

    def __init__(self, folder: Path, header: dict[str, Any], names: list[str]) -> None:
        self._names = names
        slug = re.sub(r"[^a-z0-9]+", "-", header["card"].lower()).strip("-")
        self.path = folder / f"{slug}.md"
        self._json = folder / f"{slug}.json"
        self._plot = folder / f"{slug}.png"
        self.document: Document = {**header, "parts": {}}
        earlier: Document = {}
        if self._json.is_file():
            earlier = without_format(json.loads(self._json.read_text()), RESULT_FORMAT, str(self._json))
        self.outdated = any(earlier.get(name, value) != value for name, value in header.items())
        if earlier and not self.outdated:
            self.document["parts"] = earlier["parts"]
        else:
            self._plot.unlink(missing_ok=True)

    @property
    def limits(self) -> dict[str, float] | None:
        outcome = self.document["parts"].get("limits", {})
        found: dict[str, float] | None = outcome["result"] if outcome.get("status") == "passed" else None
        return found

    def has_passed(self, name: str) -> bool:
        """Whether the part has passed, in this run or an earlier one. A skipped part did not pass, so it runs again."""
        return bool(self.document["parts"].get(name, {}).get("status") == "passed")

    def add(self, name: str, outcome: dict[str, Any]) -> None:
        """Record an outcome, and write the page and the JSON file; after a measurement of inference, also the plot."""
        self.document["parts"][name] = outcome
        if name.startswith("inference d"):
            plot_verdict(self._plot, self.document)
        plot = self._plot.name if self._plot.exists() else ""
        self.path.write_text(page(self.document, self._names, plot), encoding="utf-8")
        replacement = self._json.with_suffix(".tmp")
        replacement.write_text(json.dumps(with_format(self.document, RESULT_FORMAT), indent=2) + "\n", encoding="utf-8")
        replacement.replace(self._json)


def source_digest() -> str:
    """A digest of the code that is measured: the core, the jobs, and the tests and comparisons that the parts run."""
    digest = hashlib.sha256()
    folders = ("nanochat_core", "jobs", "tests/unit", "tests/support", "tests/benchmarks")
    files = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp"))
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _absolute(path: str) -> str:
    return str(user_path(path).resolve()) if path else ""


def _installed() -> str:
    """The folder that has the package transformers; empty if it is not installed."""
    found = importlib.util.find_spec("transformers")
    return str(Path(found.origin).parents[1]) if found and found.origin else ""


if __name__ == "__main__":
    show = functools.partial(print, flush=True)
    run_program("jobs.eval.gpu", "gpu", GpuSettings, lambda settings: run(settings, show))
