"""The report card of a model: ``python -m jobs.eval.report --model demo``."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Literal

from jobs.eval.checkpoints import newest_stages
from jobs.eval.report_card.contents import Wanted, gather
from jobs.eval.report_card.files import write_report
from nanochat_core import logs
from nanochat_core.checkpoint import check_model_name
from nanochat_core.cpu_setup import prepare_cpu
from nanochat_core.errors import run_main
from nanochat_core.settings import load, setting
from nanochat_core.store import DEFAULT_HOME, open_store

log = logging.getLogger("jobs.eval.report")


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """Measure what was not measured yet and write reports/<model>/ with report.md, report.json and plots."""

    model: str = setting(help="name of the model in the store")
    revision: str = setting("", "<stage>/step_<n> that the report is about; the newest of the last stage otherwise")
    recipe: str = setting(
        "", "recipe whose kinds of conversations are asked; the one that the pipeline made the model with"
    )
    home: str = setting(DEFAULT_HOME, "artifact store: a folder or s3://bucket/prefix", env="NANOCHAT_HOME")
    items: int = setting(200, "held-out conversations", minimum=7)
    text_bytes: int = setting(8_000_000, "bytes of held-out text", minimum=1)
    samples: int = setting(6, "text samples of the base model", minimum=1)
    price_per_hour: float | None = setting(
        None, "what an hour of the machine that trained costs; without it no cost is shown", minimum=0.0
    )
    threads: int = setting(0, "CPU threads; 0 leaves the choice to torch", minimum=0)
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe level that is logged")


def run(settings: ReportSettings) -> dict[str, Any]:
    """Measure, write the report into the store, and give back ``report.json``'s content.

    Raises:
        UserError: the store has no such model, or there is no such recipe.
    """
    prepare_cpu(settings.threads)
    store = open_store(settings.home)
    stages = newest_stages(store, check_model_name(settings.model), settings.revision)
    wanted = Wanted(settings.recipe, settings.items, settings.text_bytes, settings.samples, settings.price_per_hour)
    report = gather(store, settings.model, stages, wanted)
    write_report(store, report, {stage: checkpoint.meta.get("history", []) for stage, checkpoint in stages.items()})
    bpb = report.get("base", {}).get("held_out_bits_per_byte")
    log.info(
        "report written",
        extra={
            "report": f"{store}/reports/{settings.model}/report.md",
            "held_out_bits_per_byte": bpb and round(bpb, 4),
            "chat_accuracy": round(report["chat"]["accuracy"], 4) if "chat" in report else None,
        },
    )
    return report


def main() -> None:
    settings = load(ReportSettings, prefix="NANOCHAT_REPORT", program="python -m jobs.eval.report")
    logs.configure("report", settings.log_level)
    run(settings)


if __name__ == "__main__":
    run_main(main, "python -m jobs.eval.report")
