"""Train a model by reinforcement learning: ``python -m jobs.train.rl --model demo --task arithmetic``.

In each step the model answers some problems several times, and a reward function scores the answers. The policy
gradient then makes an answer more likely if its reward is higher than the mean reward of the problem's answers.
"""

import dataclasses
import logging
import math

import torch

from jobs.measures.pass_at_k import mean_pass_at_k
from jobs.tasks.registry import open_problems
from jobs.tasks.task import Problems
from jobs.train.loop.compiler import can_compile, prepare_compiler
from jobs.train.loop.run import Evaluation, Metrics
from jobs.train.loop.runtime import Runtime
from jobs.train.loop.schedule import Schedule
from jobs.train.loop.stage import Stage, run_stage
from jobs.train.reinforce.policy_gradient import PolicyGradient
from jobs.train.reinforce.rewards import REWARDS, Reward
from jobs.train.reinforce.rollouts import Answerer, RolloutSettings, RolloutSource, answering, seed_of
from nanochat_core.checkpoint import Checkpoint, CheckpointRef, newest_checkpoint
from nanochat_core.device import precise_dtype
from nanochat_core.errors import UserError
from nanochat_core.settings import setting
from nanochat_core.training.distributed import Ranks
from nanochat_core.training.optim import OptimizerConfig, parameter_groups

log = logging.getLogger("jobs.train.rl")

# The momentum is constant, because a run of few steps has no time for a momentum warmup.
_MOMENTUM = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlSettings(RolloutSettings):
    """Train a model by reinforcement learning on a task's problems, starting from the model's newest SFT checkpoint."""

    task: str = setting(help="problems to train on: arithmetic (of the demo world) or gsm8k (from the store)")
    reward: str = setting("", "reward function: " + ", ".join(REWARDS) + "; by default the reward of the task")
    steps: int | None = setting(None, "optimizer steps; replaces --epochs", minimum=1)
    epochs: float = setting(1.0, "passes over the problems", minimum=0.0, maximum=1e6)
    lr_scale: float = setting(0.05, "factor on all of pretraining's base learning rates", minimum=0.0)
    kl: float = setting(0.0, "weight of the KL divergence from the fine-tuned model; 0 omits it", minimum=0.0)
    clip: float = setting(0.0, "clip probability ratios to 1 ± this; 0 does not clip", minimum=0.0, maximum=0.99)
    held_out: int = setting(64, "largest number of held-out problems per evaluation", minimum=1)
    eval_samples: int = setting(8, "number k of answers per held-out problem, for pass@1 to pass@k", minimum=1)
    device_batch_rows: int = setting(16, "answers per forward pass on one device", minimum=1)
    compile: bool = setting(
        False, "compile the model with torch.compile; each new length of answers may compile it again"
    )
    eval_every: int = setting(20, "steps between evaluations; 0 evaluates only before and after the run", minimum=0)
    save_every: int = setting(20, "steps between checkpoints; 0 saves only at the end", minimum=0)


def input_digests(tuned: Checkpoint, problems: Problems) -> dict[str, str]:
    """Digests of the fine-tuned weights and the problems. If a digest changes, the model must be trained again."""
    return {"sft": tuned.weights_digest, "problems": problems.digest}


def reinforce(settings: RlSettings, runtime: Runtime) -> CheckpointRef:
    """Train a model on rewards, resuming if an earlier run was interrupted, and return its final checkpoint."""
    store, ranks = runtime.store, runtime.ranks
    tuned = newest_checkpoint(store, settings.model, "sft")
    if tuned is None:
        raise UserError(f"model {settings.model!r} has no SFT checkpoint; run python -m jobs.train.sft first")
    problems = open_problems(store, settings.task, settings.held_out)
    reward = REWARDS.get(settings.reward or problems.reward)
    if reward is None:
        choices = f"choose one of {', '.join(REWARDS)}, or add it to jobs/train/reinforce/rewards.py"
        raise UserError(f"--reward is {settings.reward!r}; {choices}")
    steps = settings.steps or max(1, math.ceil(settings.epochs * len(problems.training) / settings.examples))
    stage = Stage("rl", settings, runtime, tuned.config, tuned.tokenizer, tuned)
    model = stage.model
    sequences = math.ceil(settings.examples / ranks.size) * settings.samples
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.0))
    # The argument ``batch_lr_scale`` of parameter_groups is not used, because it does not scale the smear group's rate.
    for group in groups:
        group["lr"] *= settings.lr_scale
    with answering(model, tuned.tokenizer, sequences) as answerer:
        pad_id = tuned.tokenizer.bos_id
        source = RolloutSource(answerer, model, problems.training, reward, settings, steps, pad_id, ranks)

        def evaluate() -> Metrics:
            log.info("evaluating", extra={"held_out": len(problems.held_out), "step": trainer.state.step})
            source.settle()
            answerer.update_weights(model)
            return held_out_metrics(answerer, problems, reward, settings, ranks)

        reference = None
        if settings.kl:
            # The reference is the fine-tuned model with frozen weights. It has the dtype and the kernels of the trained
            # model.
            reference = tuned.build_model(runtime.device, model.compute_dtype).requires_grad_(False)
            reference.attention = model.attention
        hidden = None
        if can_compile(settings.compile, runtime.device):
            prepare_compiler(runtime.device)
            hidden = torch.compile(model.hidden)
        trainer = stage.trainer(
            groups,
            Schedule(
                steps,
                warmup_steps=1,
                warmdown_ratio=1.0,
                final_lr_fraction=0.0,
                momentum_start=_MOMENTUM,
                momentum_peak=_MOMENTUM,
                momentum_end=None,
            ),
            lambda _state: source.prefetched(trainer.state.step),
            [Evaluation(evaluate, settings.eval_every, first=True)],
            inputs=input_digests(tuned, problems),
            plan={"steps": steps, "examples": settings.examples, "samples": settings.samples},
            objective=PolicyGradient(
                model,
                clip=settings.clip,
                # Without asynchronous rollouts, a step trains the same weights that sampled its answers. The ratio of a
                # token's probability to its probability when it was sampled then differs from 1 only by rounding. It is
                # computed only with --clip, which limits these differences; without --clip, the ratio counts as 1.
                off_policy=settings.asynchronous or settings.clip > 0,
                kl=settings.kl,
                reference=reference,
                hidden=hidden,
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
        trainer.resume()
        return trainer.run()


def held_out_metrics(
    answerer: Answerer, problems: Problems, reward: Reward, settings: RlSettings, ranks: Ranks
) -> Metrics:
    """Evaluate the model on the held-out problems. The problems are divided among the ranks.

    ``heldout_reward`` and ``heldout_length`` (tokens) are means over greedy answers. ``pass_at_k`` has, for each k up
    to ``eval_samples``, the probability that at least one of k sampled answers has the full reward of 1.
    """
    samples = settings.eval_samples
    numbers = range(len(problems.held_out))[ranks.rank :: ranks.size]
    mine = [problems.held_out[number] for number in numbers]
    seeds = [seed_of(settings.seed, "held out", number) for number in numbers]
    most_likely = dataclasses.replace(settings.sampling, temperature=0.0, top_k=0)
    greedy = [rollouts[0] for rollouts in answerer.answer(mine, seeds, 1, most_likely)]
    drawn = answerer.answer(mine, seeds, samples, settings.sampling)
    # Each rank fills the columns of its own problems, so that the following sums do not depend on the number of ranks.
    figures = torch.zeros(3, len(problems.held_out), dtype=precise_dtype(answerer.device), device=answerer.device)
    for number, problem, answer, rollouts in zip(numbers, mine, greedy, drawn, strict=True):
        right = sum(reward(problem, rollout) >= 1 for rollout in rollouts)
        figures[:, number] = figures.new_tensor([reward(problem, answer), len(answer.tokens), right])
    rewards, lengths, counts = ranks.sum(figures).tolist()
    mean_reward, mean_length = (sum(values) / len(values) for values in (rewards, lengths))
    passed = mean_pass_at_k([round(count) for count in counts], samples)
    at_k = {str(k): value for k, value in enumerate(passed, 1)}
    return {"heldout_reward": mean_reward, "heldout_length": mean_length, "pass_at_k": at_k}


if __name__ == "__main__":
    run_stage("rl", RlSettings, reinforce)
