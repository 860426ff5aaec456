"""The files of a report in the store: ``reports/<model>/`` with report.md, report.json, plots and decisions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jobs.eval.report_card.document import render
from jobs.eval.report_card.plots import draw
from jobs.promotion.decisions import Decision, folder
from jobs.results.record import results_of
from nanochat_core.checkpoint import Checkpoint, CheckpointRef
from nanochat_core.store import Store

_WEIGHTS = "model.safetensors"


def write_report(store: Store, report: Mapping[str, Any], histories: Mapping[str, list[dict[str, Any]]]) -> None:
    """Replace a model's report; the gate's decisions beside it stay.

    Args:
        histories: of each stage that the model has.
    """
    model = report["model"]
    kept = {key.removeprefix(f"reports/{model}/"): store.read(key) for key in store.keys(folder(model))}
    with store.publish(f"reports/{model}", last="report.json") as target:
        for name, content in kept.items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        plots = draw(target, report, histories)
        (target / "report.md").write_text(render(report, plots), encoding="utf-8")
        (target / "report.json").write_text(_json({**report, "plots": plots}), encoding="utf-8")


def read_report(store: Store, model: str) -> dict[str, Any] | None:
    """``report.json`` of a model, or None where there is none."""
    try:
        report: dict[str, Any] = json.loads(store.read(f"reports/{model}/report.json"))
    except FileNotFoundError:
        return None
    return report


def reported(store: Store, model: str, *checkpoints: Checkpoint) -> bool:
    """Whether the store's report on ``model`` is about these checkpoints, and has all that was measured of them."""
    report = read_report(store, model)
    # Reports of earlier versions do not say what they were made of.
    return (
        report is not None
        and "measured" in report
        and all(
            report.get(checkpoint.ref.stage, {}).get("digest") == checkpoint.digests[_WEIGHTS]
            and report["measured"].get(checkpoint.ref.stage) == sorted(results_of(store, checkpoint))
            for checkpoint in checkpoints
        )
    )


def show_decision(store: Store, ref: CheckpointRef, decision: Decision) -> None:
    """Put a decision into the report, where that is about the same weights."""
    report = read_report(store, ref.model)
    # The folder may hold another program's report.
    if report is None or report.get(ref.stage, {}).get("digest") != decision.digest or "plots" not in report:
        return
    report["promotion"] = decision.summary()
    store.write(f"reports/{ref.model}/report.md", render(report, report["plots"]).encode())
    store.write(f"reports/{ref.model}/report.json", _json(report).encode())


def _json(report: Mapping[str, Any]) -> str:
    return json.dumps(report, indent=2) + "\n"
