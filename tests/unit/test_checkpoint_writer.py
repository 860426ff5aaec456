"""Checkpoints written in the background: training waits only for a copy, and earlier checkpoints survive failures."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_core.checkpoint import CheckpointRef, list_checkpoints, load_checkpoint, load_trainer_state
from nanochat_core.config import ModelConfig
from nanochat_core.model import GPT
from nanochat_core.store import FolderStore, StoreError
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.checkpoint_writer import CheckpointWriter
from nanochat_core.training.distributed import RankLost, Ranks
from nanochat_core.training.optim import MuonAdamW, OptimizerConfig, Shard, parameter_groups
from tests.support.checkpoint_replacement import CheckpointReplacement
from tests.support.ranks import run_ranks

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
FIRST, SECOND = CheckpointRef("m", "base", 1), CheckpointRef("m", "base", 2)


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def gpt(seed: int = 0) -> GPT:
    model = GPT(ModelConfig.from_depth(2, vocab_size=TOKENIZER.vocab_size, head_dim=32, context_length=16))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def save(writer: CheckpointWriter, ref: CheckpointRef, model: GPT, **changes: Any) -> None:
    given = {"meta": {}, "values": {"step": ref.step}, "shards": [Shard("state", torch.arange(4.0), 0, 4)]}
    writer.save(ref, model=model, tokenizer=TOKENIZER, **(given | changes))


class Failing:
    """Makes the next ``times`` writes of weights fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.left = times
        create = FolderStore.create

        @contextlib.contextmanager
        def sometimes(store: FolderStore, key: str) -> Iterator[Path]:
            if self.left and key.endswith("model.safetensors"):
                self.left -= 1
                raise StoreError("No space left on device")
            with create(store, key) as path:
                yield path

        monkeypatch.setattr(FolderStore, "create", sometimes)


def test_what_changes_after_the_call_is_not_in_the_checkpoint(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state, values = gpt(), torch.arange(4.0), {"history": [1]}
    before = model.head.weight.detach().clone()
    may_write = threading.Event()
    create = FolderStore.create

    def held(store: FolderStore, key: str) -> contextlib.AbstractContextManager[Path]:
        assert may_write.wait(10)
        return create(store, key)

    monkeypatch.setattr(FolderStore, "create", held)
    with CheckpointWriter(store) as writer:
        save(writer, FIRST, model, values=values, shards=[Shard("state", state, 0, 4)])
        with torch.no_grad():
            model.head.weight.zero_()
        state.zero_()
        values["history"].append(2)
        may_write.set()
    assert torch.equal(load_checkpoint(store, FIRST).weights["head.weight"], before)
    trainer = load_trainer_state(store, FIRST)
    assert trainer.values == {"history": [1]}
    read = trainer.read("state", 0, 4)
    assert read is not None
    assert read.tolist() == [0, 1, 2, 3]


def test_a_store_that_fails_for_a_while_is_tried_again(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Failing(monkeypatch, times=2)
    with caplog.at_level(logging.WARNING), CheckpointWriter(store, retry_seconds=(0.0, 0.0)) as writer:
        save(writer, FIRST, gpt())
    assert [record.reason for record in caplog.records] == ["No space left on device"] * 2
    assert list_checkpoints(store, "m", "base") == [FIRST]
    load_checkpoint(store, FIRST)


def test_a_store_that_goes_on_failing_is_an_error_and_the_checkpoint_before_stays(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    writer = CheckpointWriter(store, retry_seconds=(0.0,))
    save(writer, FIRST, gpt(1), then=lambda: done.append("first"))
    writer.wait()
    Failing(monkeypatch, times=2)
    save(writer, SECOND, gpt(2), then=lambda: done.append("second"))
    with pytest.raises(StoreError, match="No space left on device"):
        writer.wait()
    assert done == ["first"]
    assert list_checkpoints(store, "m", "base") == [FIRST]
    assert not (store.root / SECOND.prefix).exists()
    assert torch.equal(load_checkpoint(store, FIRST).weights["head.weight"], gpt(1).head.weight)
    save(writer, SECOND, gpt(2), then=lambda: done.append("again"))
    writer.wait()
    assert done == ["first", "again"]


def test_an_error_in_training_still_completes_what_is_being_written(store: FolderStore) -> None:
    def train() -> None:
        with CheckpointWriter(store) as writer:
            save(writer, FIRST, gpt())
            raise RuntimeError("training")

    with pytest.raises(RuntimeError, match="training"):
        train()
    load_checkpoint(store, FIRST)


class FullDisk(FolderStore):
    """A store that one rank cannot write to."""

    @contextlib.contextmanager
    def create(self, key: str) -> Iterator[Path]:
        raise StoreError("this disk is full")


def write_share(ranks: Ranks, root: str, fails: int) -> str:
    """Write a checkpoint of a model and its optimizer from every rank, and return the error if there was one."""
    store = (FullDisk if ranks.rank == fails else FolderStore)(Path(root))
    model = gpt()
    optimizer = MuonAdamW(parameter_groups(model, OptimizerConfig()), ranks)
    try:
        with CheckpointWriter(store, ranks, retry_seconds=()) as writer:
            save(writer, FIRST, model, shards=optimizer.shards())
    except StoreError as error:
        return str(error)
    return ""


def test_what_goes_wrong_on_one_rank_is_an_error_on_all_and_leaves_nothing(store: FolderStore) -> None:
    assert run_ranks(2, write_share, str(store.root), 1) == ["rank 1: this disk is full"] * 2
    assert store.keys("models") == []


def test_every_rank_writes_its_share_and_one_rank_can_read_all(store: FolderStore) -> None:
    assert run_ranks(3, write_share, str(store.root), -1) == ["", "", ""]
    model = gpt()
    optimizer = MuonAdamW(parameter_groups(model, OptimizerConfig()))
    trainer = load_trainer_state(store, FIRST)
    for shard in optimizer.shards():
        read = trainer.read(shard.name, 0, shard.rows)
        assert read is not None, shard.name
        assert read.shape == shard.tensor.shape
    assert load_checkpoint(store, FIRST).build_model().config == model.config


def write_while_one_rank_hangs(ranks: Ranks, root: str) -> str:
    """Write a checkpoint, but the last rank hangs while it writes. Returns the name of the first rank's error."""
    over = Path(root).with_suffix(".over")

    class Hanging(FolderStore):
        @contextlib.contextmanager
        def create(self, key: str) -> Iterator[Path]:
            hang()
            raise StoreError("too late")

    def hang() -> None:
        while not over.exists():
            time.sleep(0.05)

    model = gpt()
    optimizer = MuonAdamW(parameter_groups(model, OptimizerConfig()), ranks)
    writer = CheckpointWriter((FolderStore if ranks.leads else Hanging)(Path(root)), ranks, retry_seconds=())
    save(writer, FIRST, model, shards=optimizer.shards())
    if not ranks.leads:
        hang()
        return ""
    try:
        writer.wait()
    except RankLost as error:
        return type(error).__name__
    finally:
        over.touch()
    return ""


def test_a_rank_that_hangs_while_it_writes_is_noticed_within_the_usual_timeout(store: FolderStore) -> None:
    assert run_ranks(2, write_while_one_rank_hangs, str(store.root), timeout_seconds=10) == ["RankLost", ""]


class TestReplacement(CheckpointReplacement):
    pass


def replace_share(ranks: Ranks, root: str) -> None:
    """Writes the same checkpoint twice from every rank."""
    for _ in range(2):
        assert write_share(ranks, root, -1) == ""


def test_ranks_that_replace_a_checkpoint_agree_on_its_place(store: FolderStore) -> None:
    run_ranks(2, replace_share, str(store.root))
    files = {key.removeprefix(f"{FIRST.prefix}/").partition("/")[0] for key in store.keys(FIRST.prefix)}
    assert len(files) == 2, "the manifest and the folder of the second checkpoint"
    trainer = load_trainer_state(store, FIRST)
    optimizer = MuonAdamW(parameter_groups(gpt(), OptimizerConfig()))
    assert all(trainer.read(shard.name, 0, shard.rows) is not None for shard in optimizer.shards())


def test_a_replacement_that_fails_leaves_the_old_checkpoint_and_no_file_of_its_own(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CheckpointWriter(store, retry_seconds=()) as writer:
        save(writer, FIRST, gpt(1))
    before = store.keys("models")
    Failing(monkeypatch, times=1)
    with pytest.raises(StoreError), CheckpointWriter(store, retry_seconds=()) as writer:
        save(writer, FIRST, gpt(2))
    assert store.keys("models") == before
    assert torch.equal(load_checkpoint(store, FIRST).weights["head.weight"], gpt(1).head.weight)
