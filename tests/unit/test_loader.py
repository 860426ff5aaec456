"""Batches are the same whether a run was interrupted or not, and count exactly what should be learnt."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from jobs.train.loader import Batch, ConversationSource, PackedLoader, TextSource
from jobs.train.packing import Document
from jobs.train.shards import TextDataset, write_dataset
from nanochat_core.chat import parse_messages, render_conversation
from nanochat_core.errors import UserError
from nanochat_core.model import IGNORE_INDEX
from nanochat_core.store import open_store
from nanochat_core.tokenizer import Tokenizer

BYTES = Tokenizer([bytes([byte]) for byte in range(256)])
CONTEXT = 32
ROWS = 3
# Enough batches for every source to begin its third epoch.
BATCHES = 60


def conversation(i: int) -> dict:
    answer = [
        {"type": "text", "text": f"It is {i}"},
        {"type": "python", "text": "1" * (i % 5)},
        {"type": "python_output", "text": "1"},
    ]
    return {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": answer}]}


CONVERSATIONS = [parse_messages(conversation(i)["messages"]) for i in range(50)]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> TextDataset:
    rng = random.Random(1)
    documents = ["".join(rng.choices("abc ", k=rng.randint(1, 80))) for _ in range(70)]
    store = open_store(str(tmp_path_factory.mktemp("text")))
    write_dataset(store, "text", documents, ["held out"], source="a test")
    return TextDataset(store, "text", "train")


MakeLoader = Callable[[dict | None], PackedLoader]


@pytest.fixture(params=["text", "conversations"])
def make(request, text) -> MakeLoader:
    def make_loader(state: dict | None) -> PackedLoader:
        if request.param == "text":
            source, when_full = TextSource(text, BYTES), "crop"
        else:
            source, when_full = ConversationSource(CONVERSATIONS, BYTES, seed=5), "pad"
        return PackedLoader(
            source, rows=ROWS, context_length=CONTEXT, pad_id=BYTES.bos_id, when_full=when_full, state=state
        )

    return make_loader


def take(loader: PackedLoader, count: int) -> list[Batch]:
    return [loader.next_batch() for _ in range(count)]


def same(one: Batch, other: Batch) -> bool:
    return torch.equal(one.ids, other.ids) and torch.equal(one.targets, other.targets) and one.state == other.state


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_batches_have_the_promised_shapes_and_types(make):
    batch = make(None).next_batch()
    for tensor in (batch.ids, batch.targets):
        assert (tensor.shape, tensor.dtype) == ((ROWS, CONTEXT), torch.int64)


def test_resuming_after_any_batch_gives_exactly_the_batches_that_would_have_come(make):
    whole = take(make(None), BATCHES)
    assert whole[-1].state["cursor"] > 100
    for done in range(BATCHES - 1):
        # States are stored as JSON.
        resumed = make(json.loads(json.dumps(whole[done].state)))
        assert all(same(a, b) for a, b in zip(take(resumed, 5), whole[done + 1 :], strict=False))


def test_prefetching_changes_nothing(make):
    expected = take(make(None), 20)
    batches = make(None).prefetched()
    assert all(same(a, b) for a, b in zip(itertools.islice(batches, 20), expected, strict=True))
    batches.close()


def test_states_of_prefetched_batches_say_where_the_consumer_is_not_how_far_the_thread_is(make):
    batches = make(None).prefetched()
    next(batches)
    state = next(batches).state
    time.sleep(0.05)  # the thread goes on
    batches.close()
    assert same(make(state).next_batch(), take(make(None), 3)[2])


def test_closing_ends_the_thread(make):
    batches = make(None).prefetched()
    next(batches)
    assert len(loader_threads()) == 1
    batches.close()
    assert not loader_threads()


def test_an_error_in_the_thread_is_raised_where_batches_are_taken():
    class Breaking:
        def __len__(self) -> int:
            return 1

        def document(self, number: int) -> Document:
            if number == 4:
                raise UserError("shard_7 is damaged")
            return Document(number, np.arange(CONTEXT + 1, dtype=np.int32), np.ones(CONTEXT + 1, dtype=bool))

    batches = PackedLoader(Breaking(), rows=1, context_length=CONTEXT, pad_id=0).prefetched()
    assert len(list(itertools.islice(batches, 4))) == 4
    with pytest.raises(UserError, match="shard_7"):
        next(batches)
    assert not loader_threads()


def test_targets_are_the_next_tokens_of_the_row(make):
    for batch in take(make(None), 10):
        counted = batch.targets[:, :-1] != IGNORE_INDEX
        assert torch.equal(batch.targets[:, :-1][counted], batch.ids[:, 1:][counted])


def test_every_token_of_text_is_a_target(text):
    loader = PackedLoader(TextSource(text, BYTES), rows=ROWS, context_length=CONTEXT, pad_id=BYTES.bos_id)
    for batch in take(loader, 10):
        assert (batch.targets != IGNORE_INDEX).all()
        assert (batch.ids[:, 0] == BYTES.bos_id).all()


def test_of_conversations_only_the_assistants_own_tokens_are_targets():
    allowed = {}
    for messages in CONVERSATIONS:
        ids, mask = render_conversation(BYTES, messages)
        allowed[tuple(ids)] = [i if m else IGNORE_INDEX for i, m in zip(ids, mask, strict=True)][1:]
    loader = PackedLoader(
        ConversationSource(CONVERSATIONS, BYTES, seed=5), rows=ROWS, context_length=64, pad_id=0, when_full="pad"
    )
    for batch in take(loader, 10):
        for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
            starts = [i for i, token in enumerate(ids) if token == BYTES.bos_id]
            assert starts[0] == 0
            for start, end in itertools.zip_longest(starts, starts[1:], fillvalue=len(ids) + 1):
                # The last token of a row is a target only; padding behind the last conversation is no part of it.
                piece = [*ids[start:end], *([targets[-1]] if end > len(ids) and targets[-1] != -1 else [])]
                (expected,) = [wanted for whole, wanted in allowed.items() if tuple(piece[: len(whole)]) == whole]
                assert targets[start : start + len(expected)] == expected
                assert set(targets[start + len(expected) : end - 1]) <= {IGNORE_INDEX}


def epoch_of(source: ConversationSource, epoch: int) -> list[tuple[int, ...]]:
    return [tuple(source.document(epoch * len(source) + i).ids) for i in range(len(source))]


def test_each_epoch_has_every_conversation_once_in_an_order_of_its_own():
    source = ConversationSource(CONVERSATIONS, BYTES, seed=5)
    first, second = epoch_of(source, 0), epoch_of(source, 1)
    assert first != second
    assert set(first) == set(second)
    assert len(set(first)) == len(CONVERSATIONS)


def test_orders_depend_on_the_seed_and_the_epoch_alone():
    one, other = (ConversationSource(CONVERSATIONS, BYTES, seed=5) for _ in range(2))
    second = epoch_of(other, 1)
    epoch_of(one, 0)
    assert epoch_of(one, 1) == second
    assert epoch_of(ConversationSource(CONVERSATIONS, BYTES, seed=6), 1) != second


def test_an_epoch_has_passed_when_its_documents_are_packed_not_when_they_are_read():
    loader = PackedLoader(
        ConversationSource(CONVERSATIONS, BYTES, seed=5), rows=1, context_length=CONTEXT, pad_id=0, when_full="pad"
    )
    shown = 0
    while loader.epoch < 1:
        shown += int((loader.next_batch().ids == BYTES.bos_id).sum())
        assert loader.epoch == pytest.approx(shown / len(CONVERSATIONS))
    assert shown >= len(CONVERSATIONS)


@pytest.mark.parametrize("count", [1, 2])
def test_a_handful_of_documents_is_enough(count):
    source = ConversationSource(CONVERSATIONS[:count], BYTES, seed=0)
    loader = PackedLoader(source, rows=2, context_length=CONTEXT, pad_id=0, when_full="pad")
    assert all((batch.targets != IGNORE_INDEX).any() for batch in take(loader, 5))
