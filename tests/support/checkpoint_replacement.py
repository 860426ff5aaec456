"""Tests that kill the writer of a checkpoint at each of its writes, for every kind of store."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanochat_core.checkpoint import CheckpointRef, load_checkpoint, load_trainer_state, promote, promoted
from nanochat_core.checkpoint.names import MANIFEST
from nanochat_core.config import ModelConfig
from nanochat_core.model import GPT
from nanochat_core.store import Store
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.checkpoint_writer import save_checkpoint
from nanochat_core.training.optim import Shard

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
REF = CheckpointRef("m", "sft", 40)
# The replacement of a checkpoint takes fewer writes than this.
MANY = 100


class Killed(BaseException):
    """Ends the writer in the same way as SIGKILL: the writer makes no further change."""


class Killer:
    """Kills the writer before one change of the store, and refuses every later change.

    ``at`` is the index of that change, counted from 0.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[Store], at: int) -> None:
        self.changes, self.at = 0, at
        create = kind.create

        @contextlib.contextmanager
        def created(store: Store, key: str) -> Iterator[Path]:
            self.change()
            with create(store, key) as path:
                yield path
                self.change()

        monkeypatch.setattr(kind, "create", created)
        for name in ("write", "put", "remove", "delete"):
            self.watch(monkeypatch, kind, name)

    def watch(self, monkeypatch: pytest.MonkeyPatch, kind: type[Store], name: str) -> None:
        original = getattr(kind, name)

        def changed(store: Store, *args: object) -> None:
            self.change()
            original(store, *args)

        monkeypatch.setattr(kind, name, changed)

    def change(self) -> None:
        self.changes += 1
        if self.changes > self.at:
            raise Killed


def save(store: Store, value: float) -> None:
    """Saves a checkpoint in which every number is ``value``."""
    model = GPT(ModelConfig.from_depth(1, vocab_size=TOKENIZER.vocab_size, head_dim=32, context_length=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    shards = [Shard("state", torch.full((4,), value), 0, 4)]
    save_checkpoint(store, REF, model=model, tokenizer=TOKENIZER, meta={"v": value}, values={"v": value}, shards=shards)


def value_of(store: Store) -> float:
    """Verifies the checkpoint and returns the value that all its numbers have."""
    checkpoint, trainer = load_checkpoint(store, REF), load_trainer_state(store, REF)
    state = trainer.read("state", 0, 4)
    assert state is not None
    values = {tensor.unique().item() for tensor in (*checkpoint.weights.values(), state)}
    assert values == {checkpoint.meta["v"]} == {trainer.values["v"]}
    return values.pop()


class CheckpointReplacement:
    """Base class with the tests. Pytest collects the tests through subclasses."""

    def test_a_writer_killed_at_any_write_leaves_the_promoted_checkpoint_whole(self, store: Store) -> None:
        save(store, 1.0)
        promote(store, REF)
        last_value = 1.0
        outcomes = []
        for at in range(MANY):
            with pytest.MonkeyPatch.context() as monkeypatch:
                Killer(monkeypatch, type(store), at)
                try:
                    save(store, 2.0)
                    killed = False
                except Killed:
                    killed = True
            assert promoted(store, "m") == REF
            outcomes.append(value_of(store))
            assert outcomes[-1] >= last_value, "a complete checkpoint never gives way to the former one"
            last_value = outcomes[-1]
            if not killed:
                break
        assert not killed
        assert outcomes.count(1.0) > 10, "the writer was killed before each of its many writes"
        assert outcomes[-1] == 2.0

    def test_the_next_writer_removes_what_a_killed_one_left(self, store: Store) -> None:
        save(store, 1.0)
        files = len(store.keys(REF.prefix))
        for at in (3, 8, 13):
            with pytest.MonkeyPatch.context() as monkeypatch:
                Killer(monkeypatch, type(store), at)
                with pytest.raises(Killed):
                    save(store, 2.0)
        assert len(store.keys(REF.prefix)) > files
        save(store, 3.0)
        assert value_of(store) == 3.0
        assert len(store.keys(REF.prefix)) == files
        assert f"{REF.prefix}/{MANIFEST}" in store.keys(REF.prefix)

    def test_a_first_writer_that_is_killed_leaves_no_checkpoint(self, store: Store) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            Killer(monkeypatch, type(store), 6)
            with pytest.raises(Killed):
                save(store, 1.0)
        assert f"{REF.prefix}/{MANIFEST}" not in store.keys(REF.prefix)
        save(store, 2.0)
        assert value_of(store) == 2.0
        assert f"{REF.prefix}/model.safetensors" in store.keys(REF.prefix)
