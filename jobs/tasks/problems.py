"""Problems for reinforcement learning; a reward scores the model's answers to them."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

from jobs.tasks.task import Messages


@dataclasses.dataclass(frozen=True)
class Problem:
    """A conversation up to the user's last message, and the dataset's answer to it."""

    messages: Messages
    answer: str


@dataclasses.dataclass(frozen=True)
class Problems:
    """Problems to train on, problems held out for evaluation, and the name of the task's usual reward."""

    training: Sequence[Problem]
    held_out: Sequence[Problem]
    reward: str

    @property
    def digest(self) -> str:
        """sha256 of the training problems."""
        digest = hashlib.sha256()
        for problem in self.training:
            digest.update(json.dumps([list(problem.messages), problem.answer]).encode())
        return digest.hexdigest()
