"""How a lesson's training shows the items, and how far the trained weights go back to those before the lesson."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import torch

from jobs.teach.curriculum import Curriculum, curriculum
from jobs.teach.memory import Memory, all_wordings
from jobs.teach.training import Probe, Trained, answered, go_back, train
from jobs.train.loop.runtime import Runtime
from jobs.train.loop.stage import StageSettings
from nanochat_core.chat import Message, Part
from nanochat_core.checkpoint import Checkpoint, load_checkpoint
from nanochat_core.lessons.items import Item
from nanochat_core.lessons.records import Plan
from nanochat_core.model import GPT
from nanochat_core.store import open_store
from nanochat_core.training.checkpoint_writer import save_checkpoint
from nanochat_core.training.distributed import ALONE
from tests.support.engine_models import BYTES, tiny_model
from tests.support.lesson_store import SFT, with_model

# The tokens that a model of random weights predicts have probabilities on both sides of this one.
SURE = 0.3
TRIED = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


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


def test_weights_go_back_until_little_enough_is_forgotten_and_no_further_than_the_lesson_allows() -> None:
    start = tiny_model()
    ways = set()
    for seed in range(12):
        trained = disturbed(start, 0.3, seed)
        known = [probe_of(start, first, 1) for first in range(60)]
        lesson = [probe_of(trained, first, 1) for first in range(100, 100 + seed)]
        sure = answered(trained, lesson, SURE).count(True)
        expected = 1.0
        for way in (1.0, *TRIED):
            between = moved(start, trained, way)
            if answered(between, lesson, SURE).count(True) < sure:
                break
            expected = way
            if answered(between, known).count(False) <= 0.1 * len(known):
                break
        model = copy.deepcopy(trained)
        assert go_back(model, parameters_of(start), lesson, known, 0.1, SURE) == expected
        for parameter, wanted in zip(model.parameters(), moved(start, trained, expected).parameters(), strict=True):
            torch.testing.assert_close(parameter, wanted)
        ways.add(expected)
    assert len(ways) > 2, "the cases differ"


def test_a_model_is_sure_of_an_answer_if_each_of_its_tokens_is_likely() -> None:
    model = tiny_model()
    probes = [probe_of(model, first, 1 + first % 4) for first in range(40)]
    probes += [(np.flip(ids).copy(), mask) for ids, mask in probes]

    def slowly(probe: Probe, least: float) -> bool:
        ids, mask = probe
        for i in np.flatnonzero(mask):
            with torch.inference_mode():
                probabilities = model(torch.tensor(ids[None, :i]).long())[0, -1].double().softmax(-1)
            token = int(ids[i])
            if probabilities.argmax() != token or probabilities[token] < least:
                return False
        return True

    for least in (0.0, SURE):
        found = answered(model, probes, least)
        assert found == [slowly(probe, least) for probe in probes]
        assert True in found
        assert False in found
    assert answered(model, [], SURE) == []


def test_weights_stay_if_nothing_is_forgotten() -> None:
    start = tiny_model()
    trained = disturbed(start, 0.3, 1)
    model = copy.deepcopy(trained)
    known = [probe_of(trained, first, 1) for first in range(9)]
    assert go_back(model, parameters_of(start), [], known, 0.0) == 1
    assert go_back(model, parameters_of(start), [], [], 0.0) == 1
    assert all(map(torch.equal, model.parameters(), trained.parameters()))


def test_training_goes_on_while_the_model_forgets_too_much(tmp_path: Path) -> None:
    parent = load_checkpoint(with_model(tmp_path), SFT)
    lesson = (np.asarray([1, 2, 3, 4] * 8, dtype=np.int32), np.arange(32) > 0)
    kept = [probe_of(parent.build_model(), first, 1) for first in range(60, 90)]
    plan = Plan(batch_tokens=64, max_steps=300, lr_scale=0.5)
    settings = StageSettings(home=str(tmp_path), model=SFT.model, device="cpu", threads=1, compile=False)
    runtime = Runtime(open_store(str(tmp_path)), torch.device("cpu"), ALONE, None)

    def steps(documents: list[Probe], others: list[Probe]) -> int:
        tested: list[int] = []
        trained = train(
            parent, Curriculum(documents), [lesson], [], others, plan, settings, runtime, lambda *_: tested.append(1)
        )
        assert answered(trained.model, [lesson]) == [True]
        return trained.steps

    assert steps([lesson], []) == 120
    assert steps([lesson], kept) == 300, "nothing teaches again what is forgotten"
    assert 120 <= steps([lesson, *kept], kept) < 300


def test_training_goes_on_until_the_model_is_sure_of_earlier_lessons_again(tmp_path: Path) -> None:
    lessons = [(np.asarray(ids * 8, dtype=np.int32), np.arange(32) > 0) for ids in ([1, 2, 3, 4], [5, 2, 6, 4])]
    settings = StageSettings(home=str(tmp_path), model=SFT.model, device="cpu", threads=1, compile=False)
    store = open_store(str(tmp_path))
    runtime = Runtime(store, torch.device("cpu"), ALONE, None)

    def taught(parent: Checkpoint, documents: list[Probe], new: Probe, earlier: list[Probe], steps: int) -> Trained:
        plan = Plan(batch_tokens=64, max_steps=steps, lr_scale=0.5)
        return train(parent, Curriculum(documents), [new], earlier, [], plan, settings, runtime, lambda *_: None)

    parent = load_checkpoint(with_model(tmp_path), SFT)
    first = taught(parent, lessons[:1], lessons[0], [], 300)
    assert answered(first.model, lessons[:1], SURE) == [True]
    after = dataclasses.replace(SFT, step=2)
    save_checkpoint(store, after, model=first.model, tokenizer=parent.tokenizer, meta={"finished": True})
    parent = load_checkpoint(store, after)
    alone = taught(parent, lessons[1:], lessons[1], [], 300)
    assert answered(alone.model, lessons, SURE) == [False, True], "the second lesson alone replaces the first"
    both = taught(parent, lessons, lessons[1], lessons[:1], 600)
    assert answered(both.model, lessons, SURE) == [True, True]
    never_sure = [(np.asarray([9, 8] * 16, dtype=np.int32), np.arange(32) > 0)]
    assert taught(parent, lessons[1:], lessons[1], never_sure, 300).steps == alone.steps


def test_an_ability_is_shown_as_written_and_mostly_as_drills() -> None:
    question, answer = Message("user", (Part("text", "2 to 5?"),)), Message("assistant", (Part("text", "It is 3."),))
    item = Item((question, answer))
    drills = [
        (Message("user", (Part("text", f"2 to {n}?"),)), Message("assistant", (Part("text", f"It is {n - 2}."),)))
        for n in range(10, 60)
    ]
    other = (Message("user", (Part("text", "Hi"),)), Message("assistant", (Part("text", "Hello."),)))
    memory = Memory([other], [], [], [], [], [], [], [], {})
    plan = Plan(max_steps=20, batch_tokens=2048)
    documents = curriculum([item], all_wordings([item]), memory, plan, BYTES, 200, {0: drills})
    shown = [BYTES.decode(documents.document(n).ids.tolist()) for n in range(len(documents))]
    as_written = sum("It is 3." in each for each in shown)
    as_drills = sum("It is" in each for each in shown) - as_written
    assert 0.05 < as_written / (as_written + as_drills) < 0.25
