"""The evaluations that run when a report is written: held-out text, held-out conversations, samples of the base model.

The results stay in the store (:mod:`jobs.results.evaluations`). So a report that is written again with the same
settings evaluates nothing twice, and the promotion gate can compare a model with its predecessors. The device and the
dtype are settings too, because both change the rounding of a model's outputs.
"""

import dataclasses
import hashlib
import json
import logging
import lzma
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from jobs.data.shards import TextDataset
from jobs.eval.chat_eval.evaluate_tasks import answer_greedily
from jobs.eval.chat_eval.scores import quote, right_by_group
from jobs.generation import SAMPLING, continue_text, openings, spread
from jobs.measures.bits_per_byte import bits_per_byte
from jobs.recipes import find_recipe
from jobs.results.evaluations import Evaluation, Result
from jobs.results.metrics import CONVERSATIONS, HELD_OUT_TEXT, SAMPLES
from jobs.tasks import demo
from nanochat_core.checkpoint import Checkpoint
from nanochat_core.device import free_memory
from nanochat_core.model import GPT
from nanochat_core.store import Store

log = logging.getLogger("jobs.eval.report")

_EXAMPLES, _WRONG = 12, 20


@dataclasses.dataclass(frozen=True)
class Computing:
    """How a model computes: its device, and the dtype of its activations and matrix products."""

    device: torch.device
    dtype: torch.dtype

    @property
    def settings(self) -> dict[str, str]:
        """Device and dtype, as entries of an evaluation's settings."""
        return {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")}

    def build(self, checkpoint: Checkpoint) -> GPT:
        """The model of a checkpoint on the device."""
        return checkpoint.build_model(self.device, self.dtype)


def evaluate_text(store: Store, base: Checkpoint, validation: Sequence[str], computing: Computing) -> Result:
    """Measure the model, ``xz -9`` and the tokenizer on held-out documents.

    Returns bits per byte of the model and of ``xz -9``, and bytes per token of the tokenizer.
    """
    text = "\n".join(validation).encode()

    def compute() -> Mapping[str, Any]:
        return {
            "bits_per_byte": bits_per_byte(computing.build(base), base.tokenizer, validation),
            "xz_9_bits_per_byte": xz_bits_per_byte(text),
            "bytes_per_token": len(text) / len(base.tokenizer.encode(text.decode())),
            "bytes": len(text),
        }

    settings = {"text": hashlib.sha256(text).hexdigest(), "documents": len(validation), **computing.settings}
    evaluation = Evaluation.of(store, base, HELD_OUT_TEXT, settings)
    return _once(evaluation, computing, compute, "evaluating held-out text", documents=len(validation))


def evaluate_conversations(store: Store, tuned: Checkpoint, recipe: str, count: int, computing: Computing) -> Result:
    """Grade the model's answers in held-out conversations of the kinds that ``recipe`` teaches.

    Returns the accuracy in total and by kind, some of the answers, and some further answers that are wrong.
    """
    items = find_recipe(recipe).evaluation_items(count)
    content = json.dumps([dataclasses.asdict(item) for item in items], sort_keys=True).encode()

    def compute() -> Mapping[str, Any]:
        task = demo.task(items)
        graded = answer_greedily(tuned, task, device=computing.device, dtype=computing.dtype)
        kinds = right_by_group(task.questions, graded)
        quotes = [
            {"kind": question.group, **quote(question, answers)}
            for question, answers in zip(task.questions, graded, strict=True)
        ]
        # The quotes are grouped by kind, so examples that are spread evenly over the quotes are of many kinds.
        examples = spread(quotes, _EXAMPLES)
        wrong = [each for each in quotes if not each["right"] and each not in examples]
        return {
            "accuracy": sum(right for right, _ in kinds.values()) / len(items),
            "kinds": {kind: {"right": right, "items": asked} for kind, (right, asked) in kinds.items()},
            "examples": examples,
            "wrong": spread(wrong, _WRONG),
        }

    digest = hashlib.sha256(content).hexdigest()
    settings = {"recipe": recipe, "items": len(items), "digest": digest, **computing.settings}
    evaluation = Evaluation.of(store, tuned, CONVERSATIONS, settings)
    return _once(evaluation, computing, compute, "evaluating held-out conversations", items=len(items))


def sample_continuations(
    store: Store, base: Checkpoint, validation: Sequence[str], count: int, computing: Computing
) -> list[list[str]]:
    """For at most ``count`` held-out documents, pairs of the document's first words and the model's continuation."""
    prompts = openings(validation, count)
    settings = {name: getattr(SAMPLING, name) for name in ("temperature", "top_k", "max_tokens", "seed")}
    settings |= {"prompts": prompts, **computing.settings}
    evaluation = Evaluation.of(store, base, SAMPLES, settings)

    def compute() -> Mapping[str, Any]:
        return {"samples": continue_text(computing.build(base), base.tokenizer, prompts)}

    result = _once(evaluation, computing, compute, "sampling continuations", samples=count)
    samples: list[list[str]] = result["samples"]
    return samples


def first_documents(store: Store, datasets: Sequence[str], size: int) -> list[str]:
    """The first validation documents of each dataset, until the dataset's share of ``size`` bytes is reached."""
    taken = []
    for dataset in datasets:
        total = 0
        for document in TextDataset(store, dataset, "val"):
            if total >= size / len(datasets):
                break
            total += len(document.encode())
            taken.append(document)
    return taken


def xz_bits_per_byte(text: bytes) -> float:
    """The bits per byte that ``xz -9`` needs for a text. A good language model needs fewer."""
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def _once(
    evaluation: Evaluation,
    computing: Computing,
    compute: Callable[[], Mapping[str, Any]],
    event: str,
    **fields: int,
) -> Result:
    """The stored result of an evaluation. If there is none, logs the event, computes the result and stores it."""
    if (found := evaluation.result()) is not None:
        return found
    log.info(event, extra=fields)
    # The size of an engine's KV cache on a GPU follows from the memory that is free when the engine starts.
    free_memory(computing.device)
    started = time.monotonic()
    result = compute()
    return evaluation.finish({**result, "seconds": round(time.monotonic() - started, 1)})
