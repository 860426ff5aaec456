"""Lessons of a tiny model without training. Everything is real except the training, the memory and the examination.

Tests of the states of a lesson need many lessons, and check only what the store says about them. The training of such a
lesson adds a number to one weight, and its examination asks no question.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.promotion.gate import decide
from jobs.promotion.rules import Gate
from jobs.teach import session
from jobs.teach.memory import Memory
from jobs.teach.training import Trained
from nanochat_core.checkpoint import Checkpoint, CheckpointRef, load_checkpoint
from nanochat_core.config import ModelConfig
from nanochat_core.lessons.items import Item
from nanochat_core.lessons.records import Lesson, Plan, add_lesson
from nanochat_core.model import GPT
from nanochat_core.store import FolderStore, Store
from nanochat_core.training.checkpoint_writer import save_checkpoint
from tests.support.engine_models import BYTES

MODEL = "tiny"
SFT = CheckpointRef(MODEL, "sft", 1)
# A lesson with this answer is refused by the gate.
REFUSED = "I forget everything."
ACCEPT, REFUSE = Gate((), ()), Gate(("chat.accuracy>=0.8",), ())


class Killed(BaseException):
    """Ends a program as SIGKILL does, except that its leases are released at once."""


class WatchedStore(FolderStore):
    """A store that calls ``before`` with the key of each file before the file is written.

    ``before`` is not called for the files of leases, because their number depends on the time.
    """

    before: Callable[[str], None]

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        object.__setattr__(self, "before", lambda _: None)

    def _told(self, key: str) -> None:
        if not key.startswith("leases/"):
            self.before(key)

    def write(self, key: str, data: bytes) -> None:
        self._told(key)
        super().write(key, data)

    @contextlib.contextmanager
    def publish(self, prefix: str, *, last: str) -> Iterator[Path]:
        with super().publish(prefix, last=last) as path:
            yield path
            self._told(prefix)


@dataclasses.dataclass
class _Exam:
    """An examination without questions. ``gate`` has the rules that the lesson has to meet."""

    gate: Gate
    probes: Sequence[Any] = ()
    earlier: Sequence[Any] = ()
    others: Sequence[Any] = ()

    def take(self, *_: object) -> dict[str, Any]:
        return {"groups": {"taught": {"right": 1, "asked": 1}}, "answers": []}


def with_model(folder: Path, ref: CheckpointRef = SFT) -> Store:
    """A store with a promoted chat model. The step of ``ref`` determines its weights."""
    store = FolderStore(folder)
    model = GPT(ModelConfig.from_depth(1, vocab_size=BYTES.vocab_size, head_dim=32, context_length=64))
    model.init_weights(torch.Generator().manual_seed(ref.step))
    save_checkpoint(store, ref, model=model, tokenizer=BYTES, meta={})
    decide(store, load_checkpoint(store, ref), ACCEPT, promoting=True)
    return store


def queue(store: Store, answer: str) -> Lesson:
    """Put a lesson with one question into the queue."""
    items = [Item.of("What is my dog called?", answer)]
    return add_lesson(store, MODEL, items, Plan(), who="ada", source="own.md")


def without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the parts of a lesson that take long, such as the training."""

    def examination(store: Store, parent: Checkpoint, lesson: Lesson, items: Sequence[Item], *_: object) -> _Exam:
        return _Exam(REFUSE if items[0].answer == REFUSED else ACCEPT)

    def train(
        parent: Checkpoint,
        documents: object,
        probes: object,
        earlier: object,
        others: object,
        plan: object,
        settings: Any,
        runtime: object,
        tested: Callable[[Sequence[Mapping[str, float]], float], None],
    ) -> Trained:
        history = [{"step": 10, "loss": 1.0, "unseen": 1.0}]
        tested(history, 1.0)
        model = parent.build_model()
        with torch.no_grad():
            model.head.weight[0, 0] += 1.0
        return Trained(model, "auto", 1.0, 10, 1.0, history)

    monkeypatch.setattr(session, "remember", lambda *_: Memory([], [], [], [], [], [], [], [], {}))
    monkeypatch.setattr(session, "examination", examination)
    monkeypatch.setattr(session, "curriculum", lambda *_: None)
    monkeypatch.setattr(session, "train", train)
    monkeypatch.setattr(session, "lesson_gate", lambda _, exam: exam.gate)
