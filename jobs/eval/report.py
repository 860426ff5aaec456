"""The report of a run: ``python -m jobs.eval.report --model demo --recipe demo``."""

from __future__ import annotations

import dataclasses
import json
import logging
import lzma
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from jobs.eval.bpb import bits_per_byte
from jobs.eval.chat import ChatResult, evaluate, items_for, pick_checkpoint
from jobs.eval.machine import describe_machine
from jobs.eval.plots import plot_losses
from jobs.eval.samples import continue_text, openings
from jobs.train.shards import TextDataset
from nanochat_core import logs
from nanochat_core.checkpoint import Checkpoint
from nanochat_core.device import prepare_cpu
from nanochat_core.errors import run_main
from nanochat_core.settings import load, setting
from nanochat_core.store import DEFAULT_HOME, Store, open_store

log = logging.getLogger("jobs.eval.report")

_SHOWN_ANSWERS = 12


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """Evaluate a finished run and write reports/<model>/ with report.md, report.json and a loss plot."""

    model: str = setting(help="name of the model in the store; its dataset has the same name")
    recipe: str = setting(help="recipe that made the model: its kinds of conversations are evaluated")
    home: str = setting(DEFAULT_HOME, "artifact store: a folder or s3://bucket/prefix", env="NANOCHAT_HOME")
    items: int = setting(200, "held-out conversations", minimum=7)
    text_bytes: int = setting(8_000_000, "bytes of held-out text", minimum=1)
    samples: int = setting(6, "text samples of the base model", minimum=1)
    threads: int = setting(0, "CPU threads; 0 leaves the choice to torch", minimum=0)
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe level that is logged")


def reported(store: Store, model: str, base: Checkpoint, tuned: Checkpoint) -> bool:
    """Whether the store's report on ``model`` is about these checkpoints."""
    try:
        report = json.loads(store.read(f"reports/{model}/report.json"))
    except FileNotFoundError:
        return False
    return all(
        report[stage]["digest"] == checkpoint.digests["model.safetensors"]
        for stage, checkpoint in (("base", base), ("sft", tuned))
    )


def run(settings: ReportSettings) -> dict[str, Any]:
    """Measure, write the report into the store, and give back ``report.json``'s content."""
    prepare_cpu(settings.threads)
    store = open_store(settings.home)
    base = pick_checkpoint(store, settings.model, "", "base")
    tuned = pick_checkpoint(store, settings.model, "", "sft")
    validation = list(_up_to(TextDataset(store, settings.model, "val"), settings.text_bytes))
    log.info("evaluating held-out text", extra={"documents": len(validation)})
    bpb = bits_per_byte(base.build_model(), base.tokenizer, validation)
    log.info("evaluating held-out conversations", extra={"items": settings.items})
    chat = evaluate(tuned, items_for(settings.recipe, settings.items))
    text = "\n".join(validation).encode()
    report = {
        "model": settings.model,
        "recipe": settings.recipe,
        "machine": describe_machine(),
        "tokenizer": {
            "vocab_size": base.tokenizer.vocab_size,
            "held_out_bytes_per_token": len(text) / len(base.tokenizer.encode(text.decode())),
        },
        "base": _stage(base) | {"held_out_bits_per_byte": bpb, "xz_9_bits_per_byte": xz_bits_per_byte(text)},
        "sft": _stage(tuned),
        "chat": chat.summary(),
        "samples": continue_text(base, openings(validation, settings.samples)),
    }
    with store.publish(f"reports/{settings.model}", last="report.json") as folder:
        plot_losses(
            folder / "loss.png",
            [("Pretraining", base.meta["history"]), ("Fine-tuning", tuned.meta["history"])],
        )
        (folder / "report.md").write_text(render(report, chat), encoding="utf-8")
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    log.info(
        "report written",
        extra={
            "report": f"{store}/reports/{settings.model}/report.md",
            "held_out_bits_per_byte": round(bpb, 4),
            "chat_accuracy": round(chat.accuracy(), 4),
        },
    )
    return report


def _up_to(documents: Iterable[str], size: int) -> Iterator[str]:
    """The first documents, until ``size`` bytes are reached."""
    total = 0
    for document in documents:
        if total >= size:
            return
        total += len(document.encode())
        yield document


def xz_bits_per_byte(text: bytes) -> float:
    """What ``xz -9`` needs for the same text; a language model worth its name needs less."""
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def render(report: dict[str, Any], chat: ChatResult) -> str:
    """``report.md``."""
    base, sft, tokenizer, machine = report["base"], report["sft"], report["tokenizer"], report["machine"]
    lines = [
        f"# {report['model']}: report",
        "",
        f"Recipe `{report['recipe']}`, {base['parameters']:,} parameters, trained on {machine['processor']} "
        f"({machine['cores']} cores, torch {machine['torch']}).",
        "",
        "| stage | checkpoint | steps | tokens | training time | tokens/s |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {title} | `{stage['revision']}` | {stage['steps']:,} | {stage['tokens']:,} "
            f"| {stage['train_seconds']:.0f} s | {stage['tokens'] / max(stage['train_seconds'], 1e-9):,.0f} |"
            for title, stage in (("pretraining", base), ("fine-tuning", sft))
        ),
        "",
        "![Loss curves](loss.png)",
        "",
        "## Held-out text",
        "",
        "| bits per byte | |",
        "| --- | ---: |",
        f"| this model | {base['held_out_bits_per_byte']:.3f} |",
        f"| `xz -9` on the same text | {base['xz_9_bits_per_byte']:.3f} |",
        "",
        f"Tokenizer: {tokenizer['vocab_size']:,} ids, {tokenizer['held_out_bytes_per_token']:.2f} bytes per token.",
        "",
        "## Held-out conversations",
        "",
        f"{chat.accuracy():.1%} of {len(chat.answers)} answers right. None of their questions, numbers and words "
        "occurs in the training conversations; sums and counts must have been computed by the Python tool.",
        "",
        "| kind | right | of | accuracy |",
        "| --- | ---: | ---: | ---: |",
        *(f"| {kind} | {right} | {asked} | {right / asked:.1%} |" for kind, (right, asked) in chat.by_kind().items()),
        "",
        "### Some of them",
        "",
    ]
    stride = max(1, len(chat.answers) // _SHOWN_ANSWERS)
    for answer in chat.answers[::stride][:_SHOWN_ANSWERS]:
        lines += [f"> {_one_line(answer.item.messages[-1]['content'])}", ""]
        lines += [f"`{_one_line(code)}` gives `{_one_line(output)}`  " for code, output in answer.tool_calls]
        lines += [_one_line(answer.text) + ("" if answer.correct else "  *(wrong)*"), ""]
    lines += ["## Samples of the base model", ""]
    for prompt, continuation in report["samples"]:
        lines += [f"**{_one_line(prompt)}**{' ' if continuation[:1].isspace() else ''}{_one_line(continuation)}", ""]
    return "\n".join(lines)


def _stage(checkpoint: Checkpoint) -> dict[str, Any]:
    meta = checkpoint.meta
    return {
        "revision": checkpoint.ref.revision,
        "digest": checkpoint.digests["model.safetensors"],
        "steps": meta["plan"]["steps"],
        "tokens": meta["plan"]["steps"] * meta["plan"]["batch_tokens"],
        "train_seconds": meta["train_seconds"],
        "parameters": meta["parameters"],
        "settings": meta["settings"],
        "final_loss": [point["loss"] for point in meta["history"] if "loss" in point][-1],
    }


def _one_line(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    settings = load(ReportSettings, prefix="NANOCHAT_REPORT", program="python -m jobs.eval.report")
    logs.configure("report", settings.log_level)
    run(settings)


if __name__ == "__main__":
    run_main(main, "python -m jobs.eval.report")
