"""Trains a model on a lesson until the model is sure of every probe, and then lowers the learning rate to zero.

A probe is a question with its right answer, on which the model is tested during the training. The model is sure of a
probe if it gives the right answer and each token of the answer has a high probability. The number of steps has a limit,
so the learning rate may begin to fall before the model is sure of every probe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from jobs.progress import ProgressDisplay
from jobs.teach.curriculum import Curriculum
from jobs.train.loop.compiler import can_compile
from jobs.train.loop.run import RunConfig, RunState
from jobs.train.loop.runtime import Runtime, StopSignal
from jobs.train.loop.schedule import Schedule
from jobs.train.loop.stage import Stage, StageSettings, rows_per_batch
from jobs.train.loop.step import TrainingStep, cross_entropy
from nanochat_core.checkpoint import LESSON, Checkpoint
from nanochat_core.lessons.records import Plan
from nanochat_core.model import GPT
from nanochat_core.training.optim import MuonAdamW, OptimizerConfig, muon_dtype, parameter_groups

log = logging.getLogger("jobs.teach")

# Steps between two tests of whether the model answers the probes, which are questions with right answers.
CHECK_EVERY = 10
_WARMUP_STEPS = 10
# A model is sure of an answer if each token of the answer has at least this probability. The value is this high because
# chat samples its answers: at the chat page's temperature of 0.6, a token with this probability is drawn at least 97
# times in 100.
_SURE = 0.9
# Training has at least this many steps before the warmdown, in which the learning rate falls to zero, even if the model
# is sure of all probes earlier, unless the largest number of steps leaves fewer. The additional steps improve the
# answers to wordings that no template makes.
_FEWEST_STEPS = 80
# Length of the warmdown as a fraction of the steps before it.
_WARMDOWN_SHARE = 0.5
_SHORTEST_WARMDOWN = 20
_PROBED_TOKENS = 4096
# If the model has forgotten too much, its weights move back toward the weights before the lesson (see go_back). Each
# step back is the share _STEP_BACK of the distance between the two weights, and the model keeps at least the share
# _NEAREST of the distance.
_STEP_BACK = 0.05
_NEAREST = 0.6

# A conversation that ends with the right answer: token ids, (length,) int32, and a mask, (length,) bool, with True for
# the tokens that the model has to produce.
Probe = tuple[np.ndarray, np.ndarray]


class LessonCanceled(Exception):
    """Somebody canceled the lesson."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """The model after the training of a lesson.

    Attributes:
        precision: the stage's ``--dtype``; with ``auto``, the one of the model before the lesson.
        way: position of ``model`` between the weights before the lesson (0) and the trained weights (1); see
            :func:`go_back`.
        history: a point for each test with the probes: ``step``, mean training ``loss`` since the point before (left
            out if no loss was finite), and ``unseen``, the share of probes of which the model is sure.
    """

    model: GPT
    precision: str
    way: float
    steps: int
    seconds: float
    history: list[dict[str, float]]


def train(
    parent: Checkpoint,
    documents: Curriculum,
    probes: Sequence[Probe],
    earlier: Sequence[Probe],
    others: Sequence[Probe],
    plan: Plan,
    settings: StageSettings,
    runtime: Runtime,
    tested: Callable[[Sequence[Mapping[str, float]], float], None],
) -> Trained:
    """Train ``parent`` on the documents until it is sure of every probe, for at most ``plan.max_steps`` steps.

    ``earlier`` are questions of earlier lessons with their answers. Those that ``parent`` answers rightly become probes
    too, because a lesson must not replace an earlier one.

    ``others`` are questions with right answers that no lesson teaches. If the number of right answers to them
    has decreased by more than ``plan.margin * len(others)`` when the training would end, the training goes on until it
    has twice as many steps, but not more than ``plan.max_steps``. Of the ``others`` that ``parent`` answers rightly,
    the trained model may forget the share ``plan.margin / 2``. If it has forgotten more at the end, its weights move
    back as :func:`go_back` describes.

    After each test with the probes, ``tested`` is called with the history and the seconds since the beginning. It may
    raise an error, such as LessonCanceled, which ends the training.

    Raises:
        SystemExit: SIGTERM or SIGINT arrived.
        LeaseLost: another program has taken over the lease on the model.
        TrainingDiverged: five steps in a row were skipped, for example because the loss was not finite.
    """
    stage = Stage(LESSON, settings, runtime, parent.config, parent.tokenizer, parent)
    model = stage.model
    start = [parameter.detach().clone() for parameter in model.parameters()]
    probes = [*probes, *itertools.compress(earlier, answered(model, earlier))]
    known = list(itertools.compress(others, answered(model, others)))
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.0), batch_lr_scale=plan.lr_scale)
    optimizer = MuonAdamW(groups, runtime.ranks, muon_dtype(runtime.device))
    compile = can_compile(settings.compile, runtime.device)
    objective = cross_entropy(model, compile=compile, device=runtime.device)
    rows = rows_per_batch(plan.batch_tokens, min(parent.config.context_length, plan.batch_tokens))
    loader = stage.packed_loader(
        documents, rows=rows, context_length=plan.batch_tokens // rows, when_full="pad", workers=1
    )
    state, history, started = RunState(), list[dict[str, float]](), time.monotonic()

    def step_until(end: int, warmdown_from: int | None) -> TrainingStep:
        schedule = Schedule(
            end,
            warmup_steps=_WARMUP_STEPS,
            warmdown_ratio=0.0 if warmdown_from is None else 1.0,
            final_lr_fraction=0.0,
            momentum_peak=0.95,
            momentum_end=None,
            momentum_warmup_steps=100,
            first_step=warmdown_from or 0,
        )
        config = RunConfig(parent.ref.model, LESSON, schedule, settings, {})
        return TrainingStep(model, optimizer, objective, config, runtime, state)

    # The warmdown begins after this step at the latest, so that it ends within plan.max_steps.
    latest = max(1, int(plan.max_steps / (1 + _WARMDOWN_SHARE)))
    step, end, losses = step_until(plan.max_steps, None), plan.max_steps, list[float]()
    warming_down = False
    with (
        contextlib.closing(loader.prefetched()) as batches,
        StopSignal() as stop,
        ProgressDisplay("lesson", plan.max_steps, log, "teaching") as progress,
    ):
        while state.step < end:
            report = step(batches, stop)
            if math.isfinite(report.loss):  # one loss that is not finite would spoil the mean
                losses.append(report.loss)
            if report.stopped_by:
                raise SystemExit(128 + report.stopped_by)
            if runtime.lease is not None:
                runtime.lease.check()
            if state.step % CHECK_EVERY == 0 or state.step in (latest, end):
                right = answered(model, probes, _SURE)
                share = sum(right) / max(1, len(right))
                mean = {"loss": sum(losses) / len(losses)} if losses else {}
                history.append({"step": state.step, **mean, "unseen": share})
                losses.clear()
                tested(history, time.monotonic() - started)
                if not warming_down and ((all(right) and state.step >= _FEWEST_STEPS) or state.step >= latest):
                    warming_down = True
                    end = min(plan.max_steps, state.step + max(_SHORTEST_WARMDOWN, int(_WARMDOWN_SHARE * state.step)))
                    step = step_until(end, state.step)
                elif warming_down and state.step == end < plan.max_steps and forgets(model, others, known, plan.margin):
                    # The model has forgotten too much, so training goes on: the documents include conversations of
                    # fine-tuning, which teach again what was forgotten. The learning rate has fallen to zero, so a new
                    # schedule begins.
                    end = min(plan.max_steps, 2 * end)
                    step = step_until(end, state.step)
                progress.update(state.step, dict(history[-1]))
    way = go_back(model, start, probes, known, plan.margin / 2)
    return Trained(model, stage.precision, way, state.step, time.monotonic() - started, history)


def forgets(model: GPT, others: Sequence[Probe], known: Sequence[Probe], margin: float) -> bool:
    """Whether training has reduced the number of right answers to ``others`` by more than ``margin * len(others)``.

    ``known`` are the members of ``others`` that the model answered rightly before the training.
    """
    return len(known) - sum(answered(model, others)) > margin * len(others)


@torch.no_grad()
def go_back(
    model: GPT,
    start: Sequence[Tensor],
    probes: Sequence[Probe],
    known: Sequence[Probe],
    margin: float,
    sure: float = _SURE,
) -> float:
    """Move the weights toward the weights before the training until the model has forgotten little enough.

    A model whose weights are between those of a model and its fine-tuned version has forgotten less than the fine-tuned
    version (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models"). The weights move back in steps, as long as
    the model stays sure of as many ``probes`` as before, and at most until they are at the share :data:`_NEAREST` of
    the distance from ``start`` to the trained weights.

    Args:
        start: the parameters before the training, in the order of ``model.parameters()``.
        known: questions with right answers that the model answered exactly before the training.
        margin: share of ``known`` that may be forgotten.
        sure: smallest probability of each token of an answer of which the model is sure.

    Returns:
        The position of the weights between ``start`` (0) and the trained weights (1); 1 if they have not moved.
    """
    parameters = list(model.parameters())
    trained = [parameter.clone() for parameter in parameters]

    def go_to(way: float) -> None:
        for parameter, before, after in zip(parameters, start, trained, strict=True):
            parameter.copy_(torch.lerp(before, after, way))

    way, right = 1.0, sum(answered(model, probes, sure))
    while len(known) - sum(answered(model, known)) > margin * len(known) and way > _NEAREST:
        next_way = round(way - _STEP_BACK, 6)
        go_to(next_way)
        if sum(answered(model, probes, sure)) < right:
            go_to(way)
            break
        way = next_way
    return way


@torch.inference_mode()
def answered(model: GPT, probes: Sequence[Probe], least: float = 0.0) -> list[bool]:
    """For each probe, whether greedy decoding gives exactly the tokens of its answer.

    Greedy decoding gives these tokens if each token of the answer is the most likely token after all tokens before it.
    In addition, each token of the answer must have at least the probability ``least``. One forward pass over the whole
    probe checks both conditions.
    """
    device = model.smear_scale.device
    right = [False] * len(probes)
    # Probes of about the same length share a batch, because a batch is as long as its longest probe.
    rest = sorted(range(len(probes)), key=lambda i: len(probes[i][0]))
    while rest:
        rows = max(1, _PROBED_TOKENS // max(1, len(probes[rest[-1]][0])))
        some, rest = rest[-rows:], rest[:-rows]
        longest = len(probes[some[-1]][0])
        ids = torch.zeros(len(some), longest, dtype=torch.int64)
        counted = torch.zeros(len(some), longest, dtype=torch.bool)
        for row, i in enumerate(some):
            tokens, mask = probes[i]
            ids[row, : len(tokens)] = torch.from_numpy(tokens)
            counted[row, : len(mask)] = torch.from_numpy(mask)
        ids, counted = ids.to(device), counted.to(device)
        log_probabilities, said = model(ids[:, :-1]).float().log_softmax(-1).max(-1)
        likely = log_probabilities.exp() >= least
        answers = (((said == ids[:, 1:]) & likely) | ~counted[:, 1:]).all(-1).tolist()
        for i, answer in zip(some, answers, strict=True):
            right[i] = answer
    return right
