"""How a lesson's training shows the items, and how far the trained weights go back to those before the lesson."""

import copy

import numpy as np
import torch

from jobs.teach.curriculum import curriculum
from jobs.teach.memory import Memory, all_wordings
from jobs.teach.training import Probe, answered, go_back
from nanochat_core.chat import Message, Part
from nanochat_core.lessons.items import Item
from nanochat_core.lessons.records import Plan
from nanochat_core.model import GPT
from tests.support.engine_models import BYTES, tiny_model

TRIED = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def parameters_of(model: GPT) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def moved(start: GPT, trained: GPT, way: float) -> GPT:
    """A model with the weights at this share of the way from ``start`` to ``trained``."""
    between = copy.deepcopy(start)
    with torch.no_grad():
        for parameter, before, after in zip(
            between.parameters(), parameters_of(start), parameters_of(trained), strict=True
        ):
            parameter.copy_(before + way * (after - before))
    return between


def disturbed(model: GPT, amount: float, seed: int) -> GPT:
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(amount * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator))
    return other


@torch.inference_mode()
def probe_of(model: GPT, first: int, answer: int) -> Probe:
    """A token, and the ``answer`` tokens that the model most likely writes after it."""
    ids = [first]
    for _ in range(answer):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return np.asarray(ids, dtype=np.int32), np.arange(answer + 1) > 0


def test_weights_go_back_as_far_as_the_same_number_of_probes_is_answered() -> None:
    start = tiny_model()
    ways = set()
    for seed in range(12):
        trained = disturbed(start, 0.2, seed)
        probes = [probe_of(trained, first, 1) for first in range(40)]
        expected = next((way for way in TRIED if all(answered(moved(start, trained, way), probes))), 1.0)
        model = copy.deepcopy(trained)
        assert go_back(model, parameters_of(start), probes) == expected
        assert all(answered(model, probes))
        for parameter, wanted in zip(model.parameters(), moved(start, trained, expected).parameters(), strict=True):
            torch.testing.assert_close(parameter, wanted)
        ways.add(expected)
    assert len(ways) > 1, "the cases differ"


def test_probes_that_the_trained_model_misses_do_not_keep_the_weights_from_going_back() -> None:
    start = tiny_model()
    trained = disturbed(start, 0.1, 1)
    right = [probe_of(trained, first, 2) for first in range(4)]
    ids, counted = probe_of(trained, 9, 2)
    ids[-1] = (ids[-1] + 1) % BYTES.vocab_size
    alone, beside = copy.deepcopy(trained), copy.deepcopy(trained)
    way = go_back(alone, parameters_of(start), right)
    assert go_back(beside, parameters_of(start), [*right, (ids, counted)]) == way < 1


def test_an_ability_is_shown_as_written_and_mostly_as_drills() -> None:
    question, answer = Message("user", (Part("text", "2 to 5?"),)), Message("assistant", (Part("text", "It is 3."),))
    item = Item((question, answer))
    drills = [
        (Message("user", (Part("text", f"2 to {n}?"),)), Message("assistant", (Part("text", f"It is {n - 2}."),)))
        for n in range(10, 60)
    ]
    other = (Message("user", (Part("text", "Hi"),)), Message("assistant", (Part("text", "Hello."),)))
    memory = Memory([other], [], [], [], [], [], {})
    plan = Plan(max_steps=20, batch_tokens=2048)
    documents = curriculum([item], all_wordings([item]), memory, plan, BYTES, 200, {0: drills})
    shown = [BYTES.decode(documents.document(n).ids.tolist()) for n in range(len(documents))]
    as_written = sum("It is 3." in each for each in shown)
    as_drills = sum("It is" in each for each in shown) - as_written
    assert 0.05 < as_written / (as_written + as_drills) < 0.25
