"""What an answer is worth in reinforcement learning: small functions, by name.

To add one, write a function of a :class:`Problem` and a :class:`Rollout` that gives a number, 1 for an answer that
could not be better, and put it into :data:`REWARDS`; ``--reward NAME`` then uses it. It must depend on its arguments
alone: a run that is resumed rewards the same answers again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jobs.tasks import arithmetic
from jobs.tasks import gsm8k as gsm8k_task
from jobs.tasks.answers import states_number
from jobs.tasks.problems import Problem


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One answer of the model.

    Attributes:
        prompt: the token ids that it answers.
        tokens: ids of the answer, those that tools put there and the end of the message included.
        sampled: for each of them whether the model drew it.
        logprobs: for each of them its log-probability when it was drawn, in nats, before temperature and top-k; 0 where
            it was not drawn.
        text: what a person reads, without code and output.
        calls: code and output of each Python call; of one without an answer the output is empty.
        finished: False when it was cut off at the longest length.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    sampled: tuple[bool, ...]
    logprobs: tuple[float, ...]
    text: str
    calls: tuple[tuple[str, str], ...]
    finished: bool


Reward = Callable[[Problem, Rollout], float]


def last_number(problem: Problem, rollout: Rollout) -> float:
    """1 for an answer whose last number is the right one."""
    return float(states_number(problem.answer, rollout.text))


def computed_number(problem: Problem, rollout: Rollout) -> float:
    """The same, if Python was called for it."""
    return arithmetic.reward(problem, rollout.text, bool(rollout.calls))


def gsm8k(problem: Problem, rollout: Rollout) -> float:
    """1 for the dataset's number after ``####`` (arXiv 2110.14168)."""
    return gsm8k_task.reward(problem, rollout.text)


def finished(_problem: Problem, rollout: Rollout) -> float:
    """1 for an answer that ends by itself, whatever it says: to try a run out, or to cure a model that rambles."""
    return float(rollout.finished)


REWARDS: dict[str, Reward] = {
    "last-number": last_number,
    "computed-number": computed_number,
    "gsm8k": gsm8k,
    "finished": finished,
}
