"""The files of a report in the store: ``reports/<model>/`` with report.md, report.json, plots and decisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.eval.report_card.plots import draw
from jobs.promotion.decisions import folder
from jobs.results.report_page.page import render
from jobs.results.reports import report_json
from nanochat_core.store import Store


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
        (target / "report.json").write_text(report_json({**report, "plots": plots}), encoding="utf-8")
