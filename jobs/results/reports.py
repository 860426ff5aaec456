"""The report of a model in the store: ``reports/<model>/report.json`` and the page ``report.md``."""

import json
from collections.abc import Mapping
from typing import Any

from jobs.results.evaluations import identities, read_json, results_of
from jobs.results.report_page import render
from nanochat_core.checkpoint import Checkpoint, CheckpointRef
from nanochat_core.errors import UserError
from nanochat_core.formats import with_format, without_format
from nanochat_core.store import Store

Report = dict[str, Any]
REPORT_FORMAT = 1


def read_report(store: Store, model: str) -> Report | None:
    """``report.json`` of a model, or None if the model has no report.

    Raises NewerFormatError if a newer version of nanochat wrote the report, and UserError if the report is damaged.
    """
    key = f"reports/{model}/report.json"
    try:
        report = read_json(store, key)
        return None if report is None else without_format(report, REPORT_FORMAT, key)
    except ValueError as error:
        raise UserError(f"{key} in {store} is damaged ({error}); delete it to make the report anew") from error


def is_reported(store: Store, model: str, *checkpoints: Checkpoint) -> bool:
    """Whether the report on ``model`` covers the given checkpoints and all their evaluations in the store."""
    report = read_report(store, model)
    if report is None:
        return False
    for checkpoint in checkpoints:
        stage, digest = checkpoint.ref.stage, checkpoint.weights_digest
        measured = identities(results_of(store, checkpoint.ref, digest))
        if report.get(stage, {}).get("digest") != digest or report.get("measured", {}).get(stage) != measured:
            return False
    return True


def report_promotion(store: Store, ref: CheckpointRef, digest: str, promotion: Mapping[str, Any]) -> None:
    """Write the gate's decision as ``promotion`` into the report of a model.

    ``digest`` is the sha256 of the weights that the gate judged. A report on other weights stays as it is.
    """
    report = read_report(store, ref.model)
    # A report.json without ``plots`` is left alone, because it has another form: scaling studies write such files into
    # folders of reports/, too.
    if report is None or report.get(ref.stage, {}).get("digest") != digest or "plots" not in report:
        return
    report["promotion"] = promotion
    store.write(f"reports/{ref.model}/report.md", render(report, report["plots"]).encode())
    store.write(
        f"reports/{ref.model}/report.json", (json.dumps(with_format(report, REPORT_FORMAT), indent=2) + "\n").encode()
    )
