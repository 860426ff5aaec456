"""What reinforcement learning minimizes: REINFORCE with a group's mean as baseline, and what may be added to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from jobs.train.batches.loader import Batch
from jobs.train.reinforce.rewards import Rollout
from nanochat_core.chunked_loss import softcapped_cross_entropy
from nanochat_core.model import GPT, IGNORE_INDEX

# Rewards that differ by less are equal.
_SMALLEST_DEVIATION = 1e-6


@dataclasses.dataclass(frozen=True)
class RolloutBatch(Batch):
    """Prompts with their answers; targets are the tokens that the model drew.

    ``advantages`` is (rows,) fp32, ``logprobs`` (rows, time) fp32: of each target when it was drawn, 0 elsewhere.
    """

    advantages: Tensor
    logprobs: Tensor
    noted: dict[str, float]

    @property
    def measures(self) -> dict[str, float]:
        return self.noted

    def rows(self, start: int, stop: int) -> Self:
        """Some of the rows, as long as the last target among them."""
        some = super().rows(start, stop)
        time = int((some.targets != IGNORE_INDEX).any(dim=0).nonzero().max()) + 1
        cut = {name: tensor[:, :time] for name, tensor in some._tensors().items() if tensor.dim() == 2}
        return dataclasses.replace(some, **cut)


def advantages(rewards: Tensor, *, normalize: bool) -> Tensor:
    """How much better each answer is than the mean of its group.

    Args:
        rewards: (groups, samples).
        normalize: divide by the group's standard deviation (GRPO, arXiv 2402.03300), which makes problems that are
            nearly always or nearly never solved weigh more.

    Returns:
        (groups, samples); 0 in a group of equal rewards.
    """
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    if not normalize:
        return centered
    deviation = rewards.std(dim=1, keepdim=True, correction=0)
    return torch.where(deviation > _SMALLEST_DEVIATION, centered / deviation, 0.0)


def pack(rollouts: Sequence[Rollout], advantage: Tensor, pad_id: int) -> RolloutBatch:
    """A row for each rollout, filled up with padding to the longest.

    Args:
        advantage: (rollouts,) fp32.
    """
    time = max(len(rollout.prompt) + len(rollout.tokens) for rollout in rollouts) - 1
    ids = torch.full((len(rollouts), time), pad_id, dtype=torch.int64)
    targets = torch.full_like(ids, IGNORE_INDEX)
    logprobs = torch.zeros(ids.shape)
    for row, rollout in enumerate(rollouts):
        everything = torch.tensor([*rollout.prompt, *rollout.tokens])
        first = len(rollout.prompt) - 1  # the position that predicts the first token of the answer
        end = first + len(rollout.tokens)
        ids[row, :end] = everything[:-1]
        sampled = torch.tensor(rollout.sampled)
        targets[row, first:end] = torch.where(sampled, everything[first + 1 :], IGNORE_INDEX)
        logprobs[row, first:end] = torch.tensor(rollout.logprobs) * sampled
    return RolloutBatch(ids, targets, None, advantage, logprobs, {})


def target_logprobs(model: GPT, ids: Tensor, targets: Tensor, hidden: Callable[[Tensor], Tensor]) -> Tensor:
    """Log-probability of every counted target, (counted,) fp32, in the order of rows.

    Args:
        ids, targets: (rows, time).
        hidden: the model's :meth:`~nanochat_core.model.GPT.hidden`, compiled or not.
    """
    counted = targets != IGNORE_INDEX
    states = hidden(ids)[counted]
    return -softcapped_cross_entropy(states, model.head.weight, targets[counted], model.config.vocab_size, "none")


class PolicyGradient:
    """The negative policy gradient objective, summed over the drawn tokens of some rows.

    A token counts its answer's advantage times the ratio of its probability to that with which it was drawn. On policy
    the ratio is 1 and its gradient that of the log-probability: REINFORCE. Off policy it corrects for the other
    weights; with ``clip`` it earns nothing further outside of ``1 ± clip`` (PPO, arXiv 1707.06347). ``kl`` times the
    divergence from a reference is added, by the estimator k3 (http://joschu.net/blog/kl-approx.html), whose samples are
    never negative.
    """

    def __init__(
        self,
        model: GPT,
        *,
        clip: float = 0.0,
        off_policy: bool = False,
        kl: float = 0.0,
        reference: GPT | None = None,
        hidden: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """
        Args:
            clip: 0 for none.
            off_policy: take the ratio to the probability with which a token was drawn; otherwise it is 1.
            reference: what ``kl`` keeps the model near; it is not trained.
            hidden: the model's hidden states, compiled; None for its own method.
        """
        if kl and reference is None:
            raise ValueError("a divergence needs a reference")
        self._model, self._hidden = model, hidden or model.hidden
        self._clip, self._off_policy, self._kl, self._reference = clip, off_policy, kl, reference

    def __call__(self, rows: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and sums over tokens: ``kl`` where there is a reference, ``clipped`` where ratios are clipped."""
        assert isinstance(rows, RolloutBatch)
        counted = rows.targets != IGNORE_INDEX
        logprobs = target_logprobs(self._model, rows.ids, rows.targets, self._hidden)
        advantage = rows.advantages.unsqueeze(1).expand_as(rows.targets)[counted]
        drawn = rows.logprobs[counted] if self._off_policy else logprobs.detach()
        ratio = torch.exp(logprobs - drawn)
        gain = ratio * advantage
        measures: dict[str, Tensor] = {}
        if self._clip:
            limited = ratio.clamp(1 - self._clip, 1 + self._clip) * advantage
            measures["clipped"] = (limited < gain).sum().double()
            gain = torch.minimum(gain, limited)
        loss = -gain.sum()
        if self._kl and self._reference is not None:
            with torch.no_grad():
                reference = target_logprobs(self._reference, rows.ids, rows.targets, self._reference.hidden)
            divergence = kl_k3(logprobs, reference).sum()
            measures["kl"] = divergence.detach().double()
            loss = loss + self._kl * divergence
        return loss, measures


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """The divergence of the policy that drew some tokens from a reference, estimated at each token.

    Args:
        logprobs, reference: log-probabilities of the drawn tokens under either, of one shape.
    """
    difference = reference - logprobs
    return torch.expm1(difference) - difference
