"""Write the report of a model: ``python -m jobs.eval.report --model demo``."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any, Literal

from jobs.eval.checkpoints import newest_stages
from jobs.eval.report_card.contents import gather
from jobs.eval.report_card.held_out import Computing
from jobs.eval.report_card.plots import draw
from jobs.program import JobSettings, run_program
from jobs.promotion.decisions import folder
from jobs.results.report_page import render
from jobs.results.reports import REPORT_FORMAT, read_report
from nanochat_core.checkpoint import check_model_name
from nanochat_core.device import choose_device, choose_dtype, prepare_cpu
from nanochat_core.formats import with_format
from nanochat_core.settings import setting
from nanochat_core.store import Lease, Store, open_store

log = logging.getLogger("jobs.eval.report")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportSettings(JobSettings):
    """Make the missing held-out evaluations, and write reports/<model>/ with report.md, report.json and plots."""

    model: str = setting(help="name of the model in the store")
    revision: str = setting(
        "",
        "<stage>/step_<n> or promoted; by default the newest checkpoint of the model's last stage among base, sft, rl; "
        "lessons do not count",
    )
    recipe: str = setting(
        "", "recipe whose kinds of conversations are asked; empty for the recipe that trained the model"
    )
    items: int = setting(
        212, "number of held-out conversations to draw; only those of the recipe's kinds are asked", minimum=7
    )
    text_bytes: int = setting(8_000_000, "number of bytes of held-out text, rounded up to whole documents", minimum=1)
    samples: int = setting(6, "number of text samples of the base model", minimum=1)
    price_per_hour: float | None = setting(
        None, "price of an hour of the training machine; without it the report shows no cost", minimum=0.0
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "device of the held-out evaluations")
    dtype: Literal["auto", "fp32", "bf16"] = setting("auto", "dtype of the held-out evaluations; auto is fp32 on CPUs")
    threads: int = setting(0, "CPU threads; 0 leaves the choice to torch", minimum=0, maximum=4096)


def run(settings: ReportSettings) -> dict[str, Any]:
    """Make the missing held-out evaluations, write the report, and return the content of ``report.json``."""
    prepare_cpu(settings.threads)
    device = choose_device(settings.device)
    store = open_store(settings.home)
    with Lease(store, f"reports/{check_model_name(settings.model)}", "jobs.eval.report"):
        stages = newest_stages(store, settings.model, settings.revision)
        report = gather(
            store,
            stages,
            recipe=settings.recipe,
            items=settings.items,
            text_bytes=settings.text_bytes,
            samples=settings.samples,
            computing=Computing(device, choose_dtype(settings.dtype, device)),
        )
        report["price_per_hour"] = settings.price_per_hour
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


def write_report(store: Store, report: Mapping[str, Any], histories: Mapping[str, list[dict[str, Any]]]) -> None:
    """Write a model's report, with plots of the ``histories`` of its stages, in place of an earlier report.

    The promotion gate's decisions are in the same folder and are kept.
    """
    model = report["model"]
    read_report(store, model)  # raises an error for a report of a newer version, so that it is not replaced
    kept = {key.removeprefix(f"reports/{model}/"): store.read(key) for key in store.keys(folder(model))}
    with store.publish(f"reports/{model}", last="report.json") as target:
        for name, content in kept.items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        plots = draw(target, report, histories)
        (target / "report.md").write_text(render(report, plots), encoding="utf-8")
        stored = with_format({**report, "plots": plots}, REPORT_FORMAT)
        (target / "report.json").write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program("jobs.eval.report", "report", ReportSettings, run)
