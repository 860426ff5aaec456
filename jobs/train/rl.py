"""Teach a model by what its answers are worth: ``python -m jobs.train.rl --model demo --task arithmetic``.

Each step answers some problems several times, rewards the answers, and makes those more likely that are better than
the others of their problem.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Literal

import torch

from jobs.measures.pass_at_k import pass_at_k
from jobs.tasks.problems import Problems
from jobs.tasks.registry import open_problems
from jobs.train.loop.context import (
    Place,
    RunSettings,
    comparable,
    hardware,
    make_trainable,
    run_config,
    start_reporting,
    started,
)
from jobs.train.loop.schedule import Schedule
from jobs.train.loop.trainer import Metrics, Trainer, can_compile
from jobs.train.reinforce.policy_gradient import PolicyGradient
from jobs.train.reinforce.rewards import REWARDS, Reward
from jobs.train.reinforce.rollouts import Answerer, RolloutSource, Sampling, answering, seed_of
from nanochat_core.checkpoint import Checkpoint, CheckpointRef, newest_checkpoint
from nanochat_core.errors import UserError, run_main
from nanochat_core.model import GPT
from nanochat_core.precision import choose_dtype
from nanochat_core.settings import load, setting
from nanochat_core.training.distributed import Ranks
from nanochat_core.training.optim import MuonAdamW, OptimizerConfig, muon_dtype, parameter_groups

log = logging.getLogger("jobs.train.rl")

# A run of few steps has no time to warm its momentum up.
_MOMENTUM = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlSettings(RunSettings):
    """Reinforce the fine-tuned model of the same name: make its better answers to a task's problems more likely."""

    model: str = setting(help="name of the model in the store; its newest SFT checkpoint is the start")
    task: str = setting(help="problems to practise: arithmetic (of the demo world) or gsm8k (from the store)")
    reward: str = setting("", "what an answer is worth: " + ", ".join(REWARDS) + "; the task's own when not given")
    steps: int | None = setting(None, "optimizer steps; otherwise --epochs passes", minimum=1)
    epochs: float = setting(1.0, "passes over the problems", minimum=0.0, maximum=1e6)
    examples: int = setting(16, "problems per step, all ranks together", minimum=1)
    samples: int = setting(16, "answers to each problem", minimum=2)
    temperature: float = setting(1.0, "temperature of the answers", minimum=0.01)
    top_k: int = setting(50, "most likely tokens that are drawn from; 0 for all", minimum=0)
    max_new_tokens: int = setting(256, "longest answer, in tokens, with what tools put there", minimum=1)
    lr_scale: float = setting(0.05, "factor on all of pretraining's unscaled learning rates", minimum=0.0)
    normalize: bool = setting(False, "divide advantages by the standard deviation of their problem's rewards")
    kl: float = setting(0.0, "weight of the divergence from the fine-tuned model; 0 for none", minimum=0.0)
    clip: float = setting(0.0, "clip probability ratios to 1 ± this; 0 for not", minimum=0.0, maximum=0.99)
    asynchronous: bool = setting(False, "draw the next step's answers while a step trains, from weights one step older")
    held_out: int = setting(64, "held-out problems of an evaluation", minimum=1)
    eval_samples: int = setting(8, "answers to each of them, for pass@1 up to pass@ this", minimum=1)
    seed: int = setting(1, "seed of the order of problems and of the answers", minimum=0, maximum=2**63 - 1)
    dtype: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = setting(
        "auto", "dtype of activations; pretraining's when auto"
    )
    device_batch_rows: int = setting(16, "answers per forward pass on one device", minimum=1)
    compile: bool = setting(False, "compile the model with torch.compile, anew for many of the answers' lengths")
    eval_every: int = setting(20, "steps between evaluations; 0 only before the first and at the end", minimum=0)
    save_every: int = setting(20, "steps between checkpoints; 0 only at the end", minimum=0)


def inputs(tuned: Checkpoint, problems: Problems) -> dict[str, str]:
    """Digests of what the model is made from; when they have changed it must be made anew."""
    return {"sft": tuned.weights_digest, "problems": problems.digest}


def chosen_reward(name: str, problems: Problems) -> Reward:
    """The reward of this name, or the task's own without one.

    Raises:
        UserError: there is none of this name.
    """
    name = name or problems.reward
    if name not in REWARDS:
        raise UserError(
            f"--reward is {name!r}; choose one of {', '.join(REWARDS)}, or add it to jobs/train/reinforce/rewards.py"
        )
    return REWARDS[name]


def run(settings: RlSettings, place: Place) -> CheckpointRef:
    """Train, resuming where an earlier run stopped, and save the final checkpoint."""
    store, device, ranks = place.store, place.device, place.ranks
    tuned = newest_checkpoint(store, settings.model, "sft")
    if tuned is None:
        raise UserError(f"model {settings.model!r} has no SFT checkpoint; run python -m jobs.train.sft first")
    problems = open_problems(store, settings.task, settings.held_out)
    reward = chosen_reward(settings.reward, problems)
    precision = tuned.meta.get("settings", {}).get("dtype", "auto") if settings.dtype == "auto" else settings.dtype
    dtype = choose_dtype(precision, device)
    torch.manual_seed(settings.seed)
    model = tuned.build_model(device, dtype)
    make_trainable(model, settings, device, precision)
    optimizer = MuonAdamW(_groups(model, settings.lr_scale), ranks, muon_dtype(device))
    steps = settings.steps or max(1, math.ceil(settings.epochs * len(problems.training) / settings.examples))
    config = dataclasses.replace(
        run_config(
            settings,
            model=settings.model,
            stage="rl",
            schedule=Schedule(
                steps,
                warmup_steps=1,
                warmdown_ratio=1.0,
                final_lr_fraction=0.0,
                momentum_start=_MOMENTUM,
                momentum_peak=_MOMENTUM,
                momentum_end=None,
            ),
        ),
        evaluate_first=True,
    )
    sampling = Sampling(settings.temperature, settings.top_k, settings.max_new_tokens)
    sequences = -(-settings.examples // ranks.size) * settings.samples
    with answering(model, tuned.tokenizer, sequences) as answerer:
        source = RolloutSource(
            answerer,
            model,
            problems.training,
            reward,
            examples=settings.examples,
            samples=settings.samples,
            sampling=sampling,
            normalize=settings.normalize,
            seed=settings.seed,
            steps=steps,
            save_every=settings.save_every,
            asynchronous=settings.asynchronous,
            pad_id=tuned.tokenizer.bos_id,
            ranks=ranks,
        )

        def evaluate() -> Metrics:
            log.info("evaluating", extra={"held_out": len(problems.held_out), "step": trainer.state.step})
            source.settle()
            answerer.update_weights(model)
            return held_out_metrics(answerer, problems, reward, sampling, settings.eval_samples, settings.seed, ranks)

        trainer = Trainer(
            config,
            store=store,
            model=model,
            tokenizer=tuned.tokenizer,
            optimizer=optimizer,
            make_loader=lambda _state: source.starting(trainer.state.step),
            evaluate=evaluate,
            meta={
                "settings": comparable(settings),
                "inputs": inputs(tuned, problems),
                "plan": {"steps": steps, "examples": settings.examples, "samples": settings.samples},
                "base": tuned.ref.revision,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "flops_per_token": tuned.config.flops_per_token,
                "dtype": str(dtype).removeprefix("torch."),
                "device": device.type,
                "hardware": hardware(place),
            },
            device=device,
            ranks=ranks,
            objective=PolicyGradient(
                model,
                clip=settings.clip,
                # Otherwise both probabilities are of the same weights, and differ by rounding alone.
                off_policy=settings.asynchronous or settings.clip > 0,
                kl=settings.kl,
                reference=_frozen(tuned, model) if settings.kl else None,
                hidden=torch.compile(model.hidden) if can_compile(config, device) else None,
            ),
        )
        log.info(
            "reinforcing",
            extra={
                "model": settings.model,
                "sft": tuned.ref.revision,
                "task": settings.task,
                "problems": len(problems.training),
                "held_out": len(problems.held_out),
                "steps": steps,
            },
        )
        if settings.resume:
            trainer.resume()
        return trainer.run()


def held_out_metrics(
    answerer: Answerer,
    problems: Problems,
    reward: Reward,
    sampling: Sampling,
    samples: int,
    seed: int,
    ranks: Ranks,
) -> Metrics:
    """How good answers to held-out problems are.

    Returns:
        ``heldout_reward`` and ``heldout_length`` (tokens) of greedy answers, and ``pass_at_k``: for each k up to
        ``samples`` how likely one of k drawn answers has the full reward of 1.
    """
    numbers = range(len(problems.held_out))[ranks.rank :: ranks.size]
    mine = [problems.held_out[number] for number in numbers]
    seeds = [seed_of(seed, "held out", number) for number in numbers]
    greedy = [rollouts[0] for rollouts in answerer.answer(mine, seeds, 1, sampling.greedy)]
    drawn = answerer.answer(mine, seeds, samples, sampling)
    right = [
        sum(reward(problem, rollout) >= 1 for rollout in rollouts)
        for problem, rollouts in zip(mine, drawn, strict=True)
    ]
    sums = torch.tensor(
        [
            sum(reward(problem, rollout) for problem, rollout in zip(mine, greedy, strict=True)),
            sum(len(rollout.tokens) for rollout in greedy),
            *(sum(pass_at_k(samples, count, k) for count in right) for k in range(1, samples + 1)),
        ],
        dtype=torch.float64,
        device=answerer.device,
    )
    mean_reward, mean_length, *passed = (ranks.sum(sums) / len(problems.held_out)).tolist()
    at_k = {str(k): value for k, value in enumerate(passed, 1)}
    return {"heldout_reward": mean_reward, "heldout_length": mean_length, "pass_at_k": at_k}


def _groups(model: GPT, lr_scale: float) -> list[dict[str, object]]:
    """Parameter groups with every rate scaled: those of smear and backout too, which batches leave alone."""
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.0))
    for group in groups:
        group["lr"] *= lr_scale
    return groups


def _frozen(tuned: Checkpoint, model: GPT) -> GPT:
    """The fine-tuned model as it is, computed as ``model`` is."""
    reference = tuned.build_model(model.cos.device, model.compute_dtype).requires_grad_(False)
    reference.attention = model.attention
    return reference


def main() -> None:
    settings = load(RlSettings, prefix="NANOCHAT_RL", program="python -m jobs.train.rl")
    with started(settings, settings.model) as place:
        start_reporting("rl", settings, place.ranks.rank)
        run(settings, place)


if __name__ == "__main__":
    run_main(main, "python -m jobs.train.rl")
