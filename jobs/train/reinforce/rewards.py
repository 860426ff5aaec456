"""Reward functions of reinforcement learning, by name.

To add a reward, write a function of a :class:`Problem` and a :class:`Rollout` and add it to :data:`REWARDS`. The
function returns a number; 1 is the best answer. The flag ``--reward NAME`` then selects it. The function must depend on
its arguments alone, because a resumed run rewards the same answers again.
"""

import dataclasses
from collections.abc import Callable

from jobs.tasks import gsm8k
from jobs.tasks.answers import states_number
from jobs.tasks.task import Problem


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One answer of the model.

    Attributes:
        prompt: token ids of the prompt.
        tokens: token ids of the answer, including tool output and the end of the message.
        sampled: for each token of the answer, True if the model sampled it, False if it is tool output.
        logprobs: for each token of the answer, its log-probability (in nats, before temperature and top-k) when it was
            sampled; 0 for tool output.
        text: the answer as the user reads it, without code and tool output.
        calls: code and output of each Python call that has ended.
        finished: False if the answer was cut off at the token limit or at the end of the context.
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
    """1 if the last number of the answer is correct, else 0."""
    return float(states_number(problem.answer, rollout.text))


def computed_number(problem: Problem, rollout: Rollout) -> float:
    """1 if the last number of the answer is correct and the answer called Python, else 0."""
    return float(bool(rollout.calls) and states_number(problem.answer, rollout.text))


def finished(_problem: Problem, rollout: Rollout) -> float:
    """1 if the answer was not cut off, whatever its text; else 0.

    This reward is useful for test runs, or to train the model to answer briefly.
    """
    return float(rollout.finished)


REWARDS: dict[str, Reward] = {
    "last-number": last_number,
    "computed-number": computed_number,
    "gsm8k": lambda problem, rollout: gsm8k.reward(problem, rollout.text),
    "finished": finished,
}
