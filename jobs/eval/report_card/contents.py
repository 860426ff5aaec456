"""Gathers the content of ``report.json`` from the artifact store."""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.data.mixture_entries import parse_mixture
from jobs.data.origin import read_origin
from jobs.data.shards import dataset_exists, shard_keys
from jobs.eval.bench.rows import RESULT_FORMAT
from jobs.eval.report_card import held_out
from jobs.measures.compression import EVALUATION_FORMAT
from jobs.measures.machine import describe_machine
from jobs.promotion.decisions import latest_decision
from jobs.results.evaluations import identities, read_json, results_of
from jobs.results.metrics import CHAT_TASKS, CORE
from nanochat_core.checkpoint import Checkpoint
from nanochat_core.formats import without_format
from nanochat_core.store import Store

Report = dict[str, Any]


def gather(
    store: Store,
    stages: Mapping[str, Checkpoint],
    *,
    recipe: str,
    items: int,
    text_bytes: int,
    samples: int,
    computing: held_out.Computing,
) -> Report:
    """The content of a model's report. Held-out evaluations that the store lacks are made first.

    Args:
        stages: a model's checkpoints by stage. There must be at least one stage.
        recipe: recipe that names the kinds of held-out conversations; empty for the recipe that trained the model.
        items: number of held-out conversations to draw. Only those of the recipe's kinds are asked.
        text_bytes: number of bytes of held-out text, rounded up to whole documents. If there is less text, all of it is
            used.
        samples: largest number of text samples.
        computing: device and dtype of the held-out evaluations.
    """
    final = list(stages.values())[-1]
    base, model = stages.get("base"), final.ref.model
    # The pipeline stores the recipe with which it trains a model. For other models, the recipe is empty.
    origin = read_origin(store, model) or {"recipe": ""}
    report: Report = {
        "model": model,
        "revision": final.ref.revision,
        "recipe": recipe or str(origin["recipe"]),
        "machine": describe_machine(),
        "shape": _shape(final),
        **{stage: describe_stage(checkpoint) for stage, checkpoint in stages.items()},
        "tokenizer": {"vocab_size": final.tokenizer.vocab_size},
    }
    trained_on = (base or final).meta.get("settings", {}).get("dataset", model)
    datasets = [entry.name for entry in parse_mixture(trained_on)]
    if base is not None and all(dataset_exists(store, name) or shard_keys(store, name) for name in datasets):
        documents = held_out.first_documents(store, datasets, text_bytes)
        measured = held_out.evaluate_text(store, base, documents, computing)
        report["base"]["held_out_bits_per_byte"] = measured["bits_per_byte"]
        report["base"]["xz_9_bits_per_byte"] = measured["xz_9_bits_per_byte"]
        report["tokenizer"]["held_out_bytes_per_token"] = measured["bytes_per_token"]
        report["samples"] = held_out.sample_continuations(store, base, documents, samples, computing)
    report["tokenizer"]["domains"] = _domains(store, final)
    if final.ref.stage != "base" and report["recipe"]:
        chat = held_out.evaluate_conversations(store, final, report["recipe"], items, computing)
        names = ("revision", "accuracy", "kinds", "examples", "wrong")  # results of earlier versions have no ``wrong``
        report["chat"] = {name: chat[name] for name in names if name in chat}
    results = {stage: results_of(store, point.ref, point.weights_digest) for stage, point in stages.items()}
    named = {
        name: {stage: [each for each in found if each["evaluation"] == name] for stage, found in results.items()}
        for name in (CORE, CHAT_TASKS)
    }
    report["core_results"] = {stage: found[0] for stage, found in named[CORE].items() if found}
    report["chat_results"] = {stage: found for stage, found in named[CHAT_TASKS].items() if found}
    report["measured"] = {stage: identities(found) for stage, found in results.items()}
    report["benchmark"] = _benchmark(store, model)
    report["warnings"] = warnings(report, stages)
    decision = latest_decision(store, final.ref, final.weights_digest)
    report["promotion"] = decision.summary() if decision else None
    return report


def describe_stage(checkpoint: Checkpoint) -> Report:
    """The description of a training stage. A value is None or empty if the checkpoint's metadata does not have it.

    A stage counts as finished if the metadata does not say otherwise.
    """
    meta = checkpoint.meta
    plan, hardware, history = meta.get("plan", {}), meta.get("hardware", {}), meta.get("history", [])
    steps, batch, seconds = plan.get("steps", checkpoint.ref.step), plan.get("batch_tokens"), meta.get("train_seconds")
    tokens = steps * batch if steps is not None and batch else None
    speed = tokens / seconds if tokens and seconds else None
    flops, peak = meta.get("flops_per_token"), hardware.get("peak_flops")
    losses = [point["loss"] for point in history if "loss" in point]
    return {
        "revision": checkpoint.ref.revision,
        "digest": checkpoint.weights_digest,
        "finished": meta.get("finished", True),
        "steps": steps,
        "tokens": tokens,
        "train_seconds": seconds,
        "tokens_per_second": speed,
        "mfu": speed * flops / (peak * hardware.get("ranks", 1)) if speed and flops and peak else None,
        "flops": tokens * flops if tokens and flops else None,
        "parameters": meta.get("parameters"),
        "dtype": meta.get("dtype"),
        "hardware": hardware or None,
        "settings": meta.get("settings", {}),
        "final_loss": losses[-1] if losses else None,
        "learning_rates": meta.get("learning_rates", {}),
        "gradient_norm": _median_and_largest([point["gradient_norm"] for point in history if "gradient_norm" in point]),
        "data": _data_use(plan, history),
        "held_out": {name: value for point in history for name, value in point.items() if name.startswith("val_")},
        "samples": [{"step": p["step"], "samples": p["samples"]} for p in history if "samples" in p],
        "answers": [{"step": p["step"], "answers": p["answers"]} for p in history if "answers" in p],
        "skipped_steps": meta.get("skipped_steps", []),
        "made_from": _made_from(checkpoint),
        "rl": _rl_curve(history),
    }


def _median_and_largest(values: Sequence[float]) -> Report | None:
    return {"median": statistics.median(values), "largest": max(values)} if values else None


def _data_use(plan: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> Report:
    """How a stage had used its data when it ended. A value is None if it was not recorded.

    ``epochs`` is the number of passes over the data, ``unseen_share`` the share of documents that were never shown
    completely, and ``cropped_share`` the share of tokens that were cut off or left out. ``cut`` and ``left_out`` are
    the numbers of conversations that were cut or left out because they are longer than a row.
    """
    lost = plan.get("lost", {})
    last = {name: value for point in history for name, value in point.items()}
    return {
        "epochs": last.get("epoch"),
        "unseen_share": last.get("unseen"),
        "cropped_share": lost.get("cropped_share"),
        "cut": lost.get("cut"),
        "left_out": lost.get("left_out"),
    }


def warnings(report: Report, stages: Mapping[str, Checkpoint]) -> list[str]:
    """Sentences that warn of unfinished, partial, missing or mismatched results, and of skipped steps."""
    found = []
    for stage, checkpoint in stages.items():
        described = report[stage]
        if not described["finished"]:
            found.append(f"{described['revision']} is not the end of its run.")
        if skipped := described["skipped_steps"]:
            shown = ", ".join(map(str, skipped[:8])) + (", …" if len(skipped) > 8 else "")
            found.append(
                f"{len(skipped)} steps of {described['revision']} had no finite loss or no usable gradient and were "
                f"left out: {shown}."
            )
        # The input ``base`` is the digest of the checkpoint from which training started. Only of fine-tuning is this
        # checkpoint usually a base model: a lesson starts from the promoted checkpoint, and pretraining starts from
        # the checkpoint that --start-from names.
        inputs = checkpoint.meta.get("inputs", {})
        own_base = "base" in stages and checkpoint.meta.get("base_model") is None and "base" in inputs
        if stage == "sft" and own_base and inputs["base"] != stages["base"].weights_digest:
            found.append(f"{described['revision']} was not made from the base checkpoint that is shown here.")
    scored = [("CORE", stage, result) for stage, result in report["core_results"].items()]
    scored += [("ChatCORE", stage, result) for stage, results in report["chat_results"].items() for result in results]
    for title, stage, result in scored:
        if missing := result["missing"]:
            found.append(f"{title} of {stage} is partial: {', '.join(missing)} missing.")
    if "base" in stages and "held_out_bits_per_byte" not in report["base"]:
        found.append("The store no longer has the text that the model was trained on: bits per byte are not measured.")
    return found


def _shape(checkpoint: Checkpoint) -> Report:
    config = checkpoint.config
    return {
        "layers": config.depth,
        "width": config.dim,
        "heads": config.n_head,
        "kv_heads": config.n_kv_head,
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "parameters": sum(tensor.numel() for tensor in checkpoint.weights.values()),
    }


def _made_from(checkpoint: Checkpoint) -> str:
    """Name and revision of the checkpoint that a stage started from; empty if the stage's metadata names none."""
    meta = checkpoint.meta
    return f"{meta.get('base_model', checkpoint.ref.model)} {meta['base']}" if meta.get("base") else ""


def _rl_curve(history: list[dict[str, Any]]) -> Report | None:
    """The first and the last value of each metric of reinforcement learning.

    The reward on held-out problems has its best value between the two. None if no reward was recorded.
    """
    rewards, tested, passes = (
        [point[name] for point in history if name in point] for name in ("reward", "heldout_reward", "pass_at_k")
    )
    if not rewards and not tested:
        return None
    return {
        "reward": [rewards[0], rewards[-1]] if rewards else None,
        "heldout_reward": [tested[0], max(tested), tested[-1]] if tested else None,
        "pass_at_k": [passes[0], passes[-1]] if passes else None,
    }


def _domains(store: Store, checkpoint: Checkpoint) -> Report | None:
    """The evaluation of the checkpoint's tokenizer by domain, or None if the store has no such evaluation."""
    name = checkpoint.meta.get("settings", {}).get("tokenizer", checkpoint.ref.model)
    key = f"tokenizers/{name}/evaluation.json"
    stored = read_json(store, key)
    evaluation = None if stored is None else without_format(stored, EVALUATION_FORMAT, key)
    return evaluation if evaluation and evaluation["tokenizer"]["digest"] == checkpoint.tokenizer.digest else None


def _benchmark(store: Store, model: str) -> Report | None:
    """The inference benchmark of a model, or None if the store has none.

    If the store has several benchmarks of the model, the last folder in alphabetical order counts.
    """
    for key in reversed(store.keys("reports")):
        if key.endswith("/bench.json"):
            result = without_format(json.loads(store.read(key)), RESULT_FORMAT, key)
            if result["target"].get("model") == model:
                return {"folder": key.split("/")[1], **{name: result[name] for name in ("target", "machine", "rows")}}
    return None
