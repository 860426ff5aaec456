"""Arithmetic problems for reinforcement learning: squares, and longer numbers than fine-tuning teaches."""

from jobs.demo_world.practice import practice
from jobs.demo_world.seeding import generator
from jobs.demo_world.tables import Split
from jobs.tasks.task import Problem, Problems, ask
from nanochat_core.store import Store

_TRAINING_PROBLEMS = 20_000


def problems(_store: Store, held_out: int) -> Problems:
    """Generated problems; the held-out questions use numbers that no training question contains."""

    def generate(split: Split, count: int) -> list[Problem]:
        rng = generator(f"practice/{split}", 1)
        drawn = (practice(rng, split) for _ in range(count))
        return [Problem(ask(question), answer) for question, answer in drawn]

    return Problems(generate("train", _TRAINING_PROBLEMS), generate("heldout", held_out), "computed-number")
