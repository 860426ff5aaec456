"""The loss of reinforcement learning: REINFORCE with a problem's mean reward as baseline, and common variants.

The problem: the reward R of an answer is not differentiable in the weights, because the answer is sampled. The
policy gradient theorem (REINFORCE, Williams 1992) still gives the gradient of the mean reward:

    grad E[R] = E[(R - b) * sum over tokens of grad log p(token)]

The baseline b is any number that does not depend on the answer. It does not change the mean of this estimate, and a
good baseline lowers its variance. Here b is the mean reward of all samples for the same problem, and ``A = R - b`` is
the advantage. Options:

- Normalization divides A by the standard deviation of the problem's rewards (GRPO, arXiv 2402.03300).
- Off policy, when older weights sampled the tokens, ``ratio * A`` with ``ratio = p(token) / p_sampled(token)`` replaces
  ``A * log p(token)`` (importance sampling). On policy, the ratio is 1 and both terms have the same gradient.
- Clipping with a constant c uses ``min(ratio * A, clip(ratio, 1 - c, 1 + c) * A)``, so that moving a ratio out of the
  range from 1 - c to 1 + c gains nothing (PPO, arXiv 1707.06347).
- A KL penalty keeps the model near a reference model. It uses the estimator k3
  (http://joschu.net/blog/kl-approx.html).

The loss is a sum over the sampled tokens of all answers, and the optimizer step divides it by the number of these
tokens. Every token has the same weight, whatever the length of its answer, as in DAPO (arXiv 2503.14476).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from jobs.train.batches.loader import Batch
from jobs.train.reinforce.rewards import Rollout
from nanochat_core.chunked_loss import softcapped_cross_entropy
from nanochat_core.device import precise_dtype
from nanochat_core.model import GPT, IGNORE_INDEX

# The rewards of the answers to a problem count as equal if their standard deviation is at most this value.
_SMALLEST_DEVIATION = 1e-6


@dataclasses.dataclass(frozen=True)
class RolloutBatch(Batch):
    """Prompts with their answers, one rollout per row. The targets are the tokens that the model sampled.

    Attributes:
        advantages: advantage of each row's answer, (rows,) fp32.
        logprobs: log-probability of each target when it was sampled, (rows, time) fp32; 0 elsewhere.
    """

    advantages: Tensor
    logprobs: Tensor

    def rows(self, start: int, stop: int) -> Self:
        """The batch of the rows ``start`` to ``stop - 1``, without the positions after their last target."""
        some = super().rows(start, stop)
        time = int((some.targets != IGNORE_INDEX).any(dim=0).nonzero().max()) + 1
        cut = {name: tensor[:, :time] for name, tensor in some.tensors.items() if tensor.dim() == 2}
        return dataclasses.replace(some, **cut)


def advantages(rewards: Tensor, *, normalize: bool) -> Tensor:
    """Each reward minus the mean reward of its group. One group contains the answers to one problem.

    ``rewards`` and the result are (groups, samples) fp32. With ``normalize``, the result is divided by the group's
    standard deviation, and is 0 in a group of equal rewards. This gives more weight to problems that are nearly always
    or nearly never solved.
    """
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    if not normalize:
        return centered
    deviation = rewards.std(dim=1, keepdim=True, correction=0)
    return torch.where(deviation > _SMALLEST_DEVIATION, centered / deviation, 0.0)


def pack(rollouts: Sequence[Rollout], advantage: Tensor, pad_id: int) -> RolloutBatch:
    """Make a batch of one row per rollout, padded to the longest rollout. ``advantage`` is (rollouts,) fp32."""
    time = max(len(rollout.prompt) + len(rollout.tokens) for rollout in rollouts) - 1
    ids = torch.full((len(rollouts), time), pad_id, dtype=torch.int64)
    targets = torch.full_like(ids, IGNORE_INDEX)
    logprobs = torch.zeros(ids.shape)
    for row, rollout in enumerate(rollouts):
        everything = torch.tensor([*rollout.prompt, *rollout.tokens])
        first = len(rollout.prompt) - 1  # position that predicts the first token of the answer
        end = first + len(rollout.tokens)
        ids[row, :end] = everything[:-1]
        sampled = torch.tensor(rollout.sampled)
        targets[row, first:end] = torch.where(sampled, everything[first + 1 :], IGNORE_INDEX)
        logprobs[row, first:end] = torch.tensor(rollout.logprobs) * sampled
    return RolloutBatch(ids, targets, None, advantage, logprobs)


def target_logprobs(model: GPT, ids: Tensor, targets: Tensor, hidden: Callable[[Tensor], Tensor]) -> Tensor:
    """Log-probabilities of the targets that are not IGNORE_INDEX, row by row: (counted,) fp32.

    ``ids`` and ``targets`` are (rows, time) int64. ``hidden`` is the model's method
    :meth:`~nanochat_core.model.GPT.hidden`, compiled or not.
    """
    counted = targets != IGNORE_INDEX
    states = hidden(ids)[counted]
    return -softcapped_cross_entropy(states, model.head.weight, targets[counted], model.config.vocab_size, "none")


class PolicyGradient:
    """The policy-gradient loss, summed over the sampled tokens of some rows."""

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
            clip: largest deviation from 1 to which the ratio (see ``off_policy``) is limited; 0 does not limit it.
            off_policy: use the ratio of a token's probability to its probability when it was sampled; otherwise the
                ratio is 1.
            kl: weight of the KL penalty to ``reference``, a model that is not trained; 0 omits the penalty.
            hidden: compiled version of the model's ``hidden`` method; None uses the method itself.
        """
        if kl and reference is None:
            raise ValueError("a KL penalty needs a reference model")
        self._model, self._hidden = model, hidden or model.hidden
        self._clip, self._off_policy, self._kl, self._reference = clip, off_policy, kl, reference

    def __call__(self, rows: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (a scalar), and further sums over the sampled tokens, by name.

        ``kl`` is the sum of the KL estimates if there is a KL penalty. ``clipped`` is the number of tokens whose ratio
        was clipped, if ``clip`` is not 0.
        """
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
            measures["clipped"] = (limited < gain).sum().to(precise_dtype(gain.device))
            gain = torch.minimum(gain, limited)
        loss = -gain.sum()
        if self._kl and self._reference is not None:
            with torch.no_grad():
                reference = target_logprobs(self._reference, rows.ids, rows.targets, self._reference.hidden)
            divergence = kl_k3(logprobs, reference).sum()
            measures["kl"] = divergence.detach().to(precise_dtype(divergence.device))
            loss = loss + self._kl * divergence
        return loss, measures


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Estimate KL(policy || reference) at each sampled token by k3: ``exp(d) - 1 - d``.

    ``d`` is ``log p_reference - log p_policy``. The estimate is never negative, and it is unbiased if the policy
    itself sampled the tokens. Both arguments have the log-probabilities of the same sampled tokens.
    """
    difference = reference - logprobs
    return torch.expm1(difference) - difference
