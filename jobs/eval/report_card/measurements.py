"""What a report measures itself: held-out text, held-out conversations and samples of the base model.

Each is an evaluation of its checkpoint and stays in the store, so a report that is written again measures nothing twice
and the promotion gate can compare a model with its predecessors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import lzma
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jobs.data.shards import TextDataset
from jobs.eval.chat import Answer, ChatResult, evaluate
from jobs.eval.report_card.samples import SAMPLING, continue_text, openings
from jobs.measures.bits_per_byte import bits_per_byte
from jobs.recipes import find_recipe
from jobs.results.evaluations import Evaluation
from jobs.results.metrics import CONVERSATIONS, HELD_OUT_TEXT, SAMPLES
from nanochat_core.checkpoint import Checkpoint
from nanochat_core.store import Store

log = logging.getLogger("jobs.eval.report")

_SHOWN_ANSWERS = 12


def measure_text(store: Store, base: Checkpoint, validation: Sequence[str]) -> dict[str, Any]:
    """Bits per byte of the model and of ``xz -9`` on held-out documents, and the tokenizer's bytes per token there."""
    text = "\n".join(validation).encode()
    settings = {"text": hashlib.sha256(text).hexdigest(), "documents": len(validation)}
    evaluation = Evaluation.of(store, base, HELD_OUT_TEXT, settings)
    found = evaluation.result()
    if found is not None:
        return found
    log.info("evaluating held-out text", extra={"documents": len(validation)})
    started = time.monotonic()
    result = {
        "bits_per_byte": bits_per_byte(base.build_model(), base.tokenizer, validation),
        "xz_9_bits_per_byte": xz_bits_per_byte(text),
        "bytes_per_token": len(text) / len(base.tokenizer.encode(text.decode())),
        "bytes": len(text),
    }
    return evaluation.finish(result | _seconds_since(started))


def measure_conversations(store: Store, tuned: Checkpoint, recipe: str, count: int) -> dict[str, Any]:
    """The held-out conversations of the kinds that ``recipe`` teaches: accuracy, by kind, and some of the answers.

    Raises:
        UserError: there is no such recipe.
    """
    items = find_recipe(recipe).evaluation_items(count)
    asked = json.dumps([dataclasses.asdict(item) for item in items], sort_keys=True).encode()
    settings = {
        "recipe": recipe,
        "items": len(items),
        "digest": hashlib.sha256(asked).hexdigest(),
    }
    evaluation = Evaluation.of(store, tuned, CONVERSATIONS, settings)
    found = evaluation.result()
    if found is not None:
        return found
    log.info("evaluating held-out conversations", extra={"items": len(items)})
    started = time.monotonic()
    answered = evaluate(tuned, items)
    return evaluation.finish(
        {
            "accuracy": answered.accuracy(),
            "kinds": {kind: {"right": right, "items": asked} for kind, (right, asked) in answered.by_kind().items()},
            "examples": [_example(answer) for answer in shown(answered)],
        }
        | _seconds_since(started)
    )


def measure_samples(store: Store, base: Checkpoint, validation: Sequence[str], count: int) -> list[list[str]]:
    """Openings of held-out documents, each with the model's continuation."""
    prompts = openings(validation, count)
    settings = {
        "prompts": prompts,
        "temperature": SAMPLING.temperature,
        "top_k": SAMPLING.top_k,
        "max_tokens": SAMPLING.max_tokens,
        "seed": SAMPLING.seed,
    }
    evaluation = Evaluation.of(store, base, SAMPLES, settings)
    found = evaluation.result()
    if found is None:
        found = evaluation.finish({"samples": [list(sample) for sample in continue_text(base, prompts)]})
    samples: list[list[str]] = found["samples"]
    return samples


def held_out_documents(store: Store, dataset: str, size: int) -> list[str]:
    """The first validation documents of a dataset, until ``size`` bytes are reached.

    Raises:
        UserError: there is no such dataset.
    """
    return list(_up_to(TextDataset(store, dataset, "val"), size))


def xz_bits_per_byte(text: bytes) -> float:
    """What ``xz -9`` needs for the same text; a language model worth its name needs less."""
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def shown(answered: ChatResult) -> list[Answer]:
    """A few answers, spread over all kinds."""
    stride = max(1, len(answered.answers) // _SHOWN_ANSWERS)
    return list(answered.answers[::stride][:_SHOWN_ANSWERS])


def _example(answer: Answer) -> dict[str, Any]:
    return {
        "kind": answer.item.kind,
        "question": answer.item.messages[-1]["content"],
        "calls": [list(call) for call in answer.tool_calls],
        "answer": answer.text,
        "right": answer.correct,
    }


def _up_to(documents: Iterable[str], size: int) -> Iterator[str]:
    total = 0
    for document in documents:
        if total >= size:
            return
        total += len(document.encode())
        yield document


def _seconds_since(started: float) -> dict[str, float]:
    return {"seconds": round(time.monotonic() - started, 1)}
