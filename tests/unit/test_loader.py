"""Batches do not depend on interruptions, threads or ranks. The loss counts exactly the right targets."""

import itertools
import json
import logging
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs.data.shards import TextDataset, write_dataset
from jobs.train.batches import loader as loader_module
from jobs.train.batches import sources
from jobs.train.batches.loader import Batch, PackedLoader, merge_states
from jobs.train.batches.packing import Document
from jobs.train.batches.sources import ConversationSource, Source, TextSource, WindowSource, open_texts
from nanochat_core.chat import parse_messages, render_conversation
from nanochat_core.errors import UserError
from nanochat_core.model import IGNORE_INDEX
from nanochat_core.store import open_store
from nanochat_core.tokenizer import Tokenizer

BYTES = Tokenizer([bytes([byte]) for byte in range(256)])
CONTEXT = 32
ROWS = 3
# With this many batches every source begins its third epoch.
BATCHES = 60


def conversation(i: int) -> dict[str, Any]:
    answer = [
        {"type": "text", "text": f"It is {i}"},
        {"type": "python", "text": "1" * (i % 5)},
        {"type": "python_output", "text": "1"},
    ]
    return {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": answer}]}


CONVERSATIONS = [parse_messages(conversation(i)["messages"]) for i in range(50)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    rng = random.Random(1)
    documents = ["".join(rng.choices("abc ", k=rng.randint(1, 80))) for _ in range(70)]
    store = open_store(str(tmp_path_factory.mktemp("text")))
    write_dataset(store, "text", documents, ["held out"], source="a test")
    return TextDataset(store, "text", "train")


MakeLoader = Callable[[dict[str, Any] | None], PackedLoader]


KINDS = ["text", "windows", "conversations"]


def source_and_rule(kind: str, text: TextDataset) -> tuple[Any, Any]:
    if kind == "text":
        return TextSource(text, BYTES), "fill"
    if kind == "windows":
        return WindowSource(list(text), BYTES, row_length=CONTEXT + 1, seed=5), "fill"
    return ConversationSource(CONVERSATIONS, BYTES, seed=5), "pad"


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, text: TextDataset) -> MakeLoader:
    def make_loader(state: dict[str, Any] | None) -> PackedLoader:
        source, when_full = source_and_rule(request.param, text)
        return PackedLoader(
            source, rows=ROWS, context_length=CONTEXT, pad_id=BYTES.bos_id, when_full=when_full, state=state
        )

    return make_loader


def take(loader: PackedLoader, count: int) -> list[Batch]:
    return [loader.next_batch() for _ in range(count)]


def same(one: Batch, other: Batch) -> bool:
    return torch.equal(one.ids, other.ids) and torch.equal(one.targets, other.targets) and one.state == other.state


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_batches_have_the_promised_shapes_and_types(make: Any) -> None:
    batch = make(None).next_batch()
    for tensor in (batch.ids, batch.targets):
        assert (tensor.shape, tensor.dtype) == ((ROWS, CONTEXT), torch.int64)


def test_resuming_after_any_batch_gives_exactly_the_batches_that_would_have_come(make: Any) -> None:
    whole = take(make(None), BATCHES)
    assert whole[-1].state["packers"]["0"]["cursor"] > 100
    for done in range(BATCHES - 1):
        # States are stored as JSON.
        resumed = make(json.loads(json.dumps(whole[done].state)))
        assert all(same(a, b) for a, b in zip(take(resumed, 5), whole[done + 1 :], strict=False))


def test_prefetching_changes_nothing(make: Any) -> None:
    expected = take(make(None), 20)
    batches = make(None).prefetched()
    assert all(same(a, b) for a, b in zip(itertools.islice(batches, 20), expected, strict=True))
    batches.close()


def test_states_of_prefetched_batches_say_where_the_consumer_is_not_how_far_the_thread_is(make: Any) -> None:
    batches = make(None).prefetched()
    next(batches)
    state = next(batches).state
    time.sleep(0.05)  # the thread prefetches further batches
    batches.close()
    assert same(make(state).next_batch(), take(make(None), 3)[2])


def test_closing_ends_the_thread(make: Any) -> None:
    batches = make(None).prefetched()
    next(batches)
    assert loader_threads()
    batches.close()
    assert not loader_threads()


def test_an_error_in_the_thread_is_raised_where_batches_are_taken() -> None:
    class Breaking(Source):
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


def test_targets_are_the_next_tokens_of_the_row(make: Any) -> None:
    for batch in take(make(None), 10):
        counted = batch.targets[:, :-1] != IGNORE_INDEX
        assert torch.equal(batch.targets[:, :-1][counted], batch.ids[:, 1:][counted])


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("kind", ["text", "windows"])
def test_an_epoch_of_text_has_every_token_as_a_target_once(text: TextDataset, kind: str, rows: int) -> None:
    """The first token of a row is not a target: it is BOS, or it was a target before a cut."""
    source, _ = source_and_rule(kind, text)
    expected = Counter(token for document in text for token in BYTES.encode(document))
    loader = PackedLoader(source, rows=rows, context_length=CONTEXT, pad_id=0)
    shown: Counter[int] = Counter()
    while loader.unseen:
        batch = loader.next_batch()
        shown.update(batch.targets[batch.targets >= 0].tolist())
    del shown[BYTES.bos_id]
    assert all(shown[token] >= count for token, count in expected.items())
    assert 1 <= loader.epoch < 1.3
    assert shown.total() <= 1.3 * expected.total()


def test_windows_are_the_documents_cut_with_one_token_of_context(text: TextDataset) -> None:
    source = WindowSource(list(text), BYTES, row_length=9, seed=5)
    windows = [source.document(number) for number in range(len(source))]
    assert max(len(window.ids) for window in windows) == 9
    assert all(window.counted[1:].all() for window in windows)
    assert all(window.counted[0] == (window.ids[0] == BYTES.bos_id) for window in windows)
    new = Counter(int(token) for window in windows for token in window.ids[window.counted])
    assert new == Counter(token for document in text for token in [BYTES.bos_id, *BYTES.encode(document)])
    assert len(source) == sum(max(1, math.ceil(len(BYTES.encode(document)) / 8)) for document in text)


def test_small_texts_are_cut_and_shuffled_and_large_ones_are_read_in_order(
    text: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(open_texts(text, BYTES, row_length=9, seed=5), WindowSource)
    monkeypatch.setattr(sources, "SMALL_CHARACTERS", 1000)
    source = open_texts(text, BYTES, row_length=9, seed=5)
    assert isinstance(source, TextSource)
    assert bytes(source.document(71).ids[1:].astype(np.uint8)).decode() == text[1]


def test_two_long_documents_give_every_row_of_a_batch_something_else() -> None:
    """Without windows, every packer would read these two documents from their starts, many times."""
    rng = random.Random(2)
    texts = ["".join(rng.choices("abcdefgh", k=4000)) for _ in range(2)]
    loader = PackedLoader(open_texts(texts, BYTES, row_length=33, seed=1), rows=16, context_length=32, pad_id=0)
    rows = [tuple(row) for batch in take(loader, 15) for row in batch.ids.tolist()]
    assert len(set(rows)) == len(rows)
    assert loader.unseen < 0.05
    assert loader.epoch == pytest.approx(0.96, abs=0.03)


def test_of_conversations_only_the_assistants_own_tokens_are_targets() -> None:
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
                # The last token of a row is only a target. Padding follows the last conversation.
                piece = [*ids[start:end], *([targets[-1]] if end > len(ids) and targets[-1] != -1 else [])]
                (expected,) = [wanted for whole, wanted in allowed.items() if tuple(piece[: len(whole)]) == whole]
                assert targets[start : start + len(expected)] == expected
                assert set(targets[start + len(expected) : end - 1]) <= {IGNORE_INDEX}


def epoch_of(source: ConversationSource, epoch: int) -> list[tuple[int, ...]]:
    return [tuple(source.document(epoch * len(source) + i).ids) for i in range(len(source))]


def test_each_epoch_has_every_conversation_once_in_an_order_of_its_own() -> None:
    source = ConversationSource(CONVERSATIONS, BYTES, seed=5)
    first, second = epoch_of(source, 0), epoch_of(source, 1)
    assert first != second
    assert set(first) == set(second)
    assert len(set(first)) == len(CONVERSATIONS)


def test_orders_depend_on_the_seed_and_the_epoch_alone() -> None:
    one, other = (ConversationSource(CONVERSATIONS, BYTES, seed=5) for _ in range(2))
    second = epoch_of(other, 1)
    epoch_of(one, 0)
    assert epoch_of(one, 1) == second
    assert epoch_of(ConversationSource(CONVERSATIONS, BYTES, seed=6), 1) != second


def test_an_epoch_has_passed_when_its_documents_are_packed_not_when_they_are_read() -> None:
    loader = PackedLoader(
        ConversationSource(CONVERSATIONS, BYTES, seed=5), rows=1, context_length=CONTEXT, pad_id=0, when_full="pad"
    )
    shown = 0
    while loader.epoch < 1:
        shown += int((loader.next_batch().ids == BYTES.bos_id).sum())
        assert loader.epoch == pytest.approx(shown / len(CONVERSATIONS))
    assert shown >= len(CONVERSATIONS)


@pytest.mark.parametrize("count", [1, 2])
def test_a_handful_of_documents_is_enough(count: int) -> None:
    source = ConversationSource(CONVERSATIONS[:count], BYTES, seed=0)
    loader = PackedLoader(source, rows=2, context_length=CONTEXT, pad_id=0, when_full="pad")
    assert all((batch.targets != IGNORE_INDEX).any() for batch in take(loader, 5))


def wide_loader(text: TextDataset, kind: str, **options: Any) -> PackedLoader:
    """Batches of eight rows by default."""
    source, when_full = source_and_rule(kind, text)
    given_options = {"rows": 8, "context_length": CONTEXT, "pad_id": 0, "when_full": when_full, "workers": 2}
    return PackedLoader(source, **given_options | options)


def global_batches(
    text: TextDataset, kind: str, world_size: int, count: int, state: dict[str, Any] | None
) -> list[Batch]:
    """The global batches of all ranks. All ranks start from the JSON of the merged state."""
    stored = json.loads(json.dumps(state))
    ranks = [wide_loader(text, kind, rank=rank, world_size=world_size, state=stored) for rank in range(world_size)]
    batches = []
    for _ in range(count):
        parts = [loader.next_batch() for loader in ranks]
        ids, targets = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "targets"))
        batches.append(Batch(ids, targets, merge_states([part.state or {} for part in parts])))
    return batches


lives = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 6)), min_size=1, max_size=4)


@given(kind=st.sampled_from(KINDS), lives=lives)
def test_any_world_sizes_across_any_restarts_make_the_batches_of_one_uninterrupted_rank(
    text: TextDataset, kind: Any, lives: Any
) -> None:
    whole = take(wide_loader(text, kind), sum(count for _, count in lives))
    pieces: list[Batch] = []
    for world_size, count in lives:
        pieces += global_batches(text, kind, world_size, count, pieces[-1].state if pieces else None)
    assert all(same(a, b) for a, b in zip(pieces, whole, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [1, 3, 8])
def test_the_number_of_threads_changes_nothing(text: TextDataset, kind: str, workers: int) -> None:
    expected = take(wide_loader(text, kind), 20)
    batches = wide_loader(text, kind, workers=workers).prefetched()
    assert all(same(a, b) for a, b in zip(itertools.islice(batches, 20), expected, strict=True))
    batches.close()


def test_a_state_of_its_own_packers_is_enough_for_a_rank(text: TextDataset) -> None:
    one, other = (wide_loader(text, "text", rank=1, world_size=4) for _ in range(2))
    state = one.next_batch().state
    other.next_batch()
    resumed = wide_loader(text, "text", rank=1, world_size=4, state=state)
    assert same(resumed.next_batch(), other.next_batch())


def test_a_state_that_lacks_a_packer_is_refused(text: TextDataset) -> None:
    state = wide_loader(text, "text", rank=1, world_size=4).next_batch().state
    with pytest.raises(UserError, match="is incomplete, it lacks packer 0 of 8: merge the states of all ranks"):
        wide_loader(text, "text", state=state)


def test_a_state_of_another_loader_is_refused(text: TextDataset) -> None:
    state = wide_loader(text, "text", rows=4).next_batch().state
    with pytest.raises(UserError, match="for 4 packers, but this run has 8: the run before had another number of rows"):
        wide_loader(text, "text", state=state)


@pytest.mark.parametrize(("state", "format"), [({"of": 8, "packers": {}}, 1), ({"format": 3, "of": 8}, 3)])
def test_a_state_of_another_version_is_refused(text: TextDataset, state: Any, format: int) -> None:
    with pytest.raises(UserError, match=f"format {format}, .* only 2: another version .*; finish the run with that"):
        wide_loader(text, "text", state=state)


def test_states_of_different_loaders_are_not_merged(text: TextDataset) -> None:
    states = [wide_loader(text, "text", rows=rows).next_batch().state for rows in (2, 4)]
    with pytest.raises(ValueError, match="different loaders"):
        merge_states(states)


@pytest.mark.parametrize("world_size", [3, 5, 7])
def test_shares_of_ranks_differ_by_at_most_one_row(text: TextDataset, world_size: int) -> None:
    ranks = [wide_loader(text, "text", rank=rank, world_size=world_size) for rank in range(world_size)]
    rows = [len(rank.next_batch().ids) for rank in ranks]
    assert sum(rows) == 8
    assert max(rows) - min(rows) <= 1


def test_a_batch_of_more_rows_than_packers_gives_each_packer_some(
    text: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "MAX_PACKERS", 16)
    rows = 2 * 16 + 5
    whole, parts = (
        [wide_loader(text, "text", rows=rows, rank=rank, world_size=size).next_batch() for rank in range(size)]
        for size in (1, 7)
    )
    assert len(whole[0].ids) == rows
    assert torch.equal(torch.cat([part.ids for part in parts]), whole[0].ids)
    assert merge_states(part.state or {} for part in parts) == whole[0].state


def test_ranks_without_rows_compute_one_without_targets(text: TextDataset, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        batches = [wide_loader(text, "text", rows=2, rank=rank, world_size=3).next_batch() for rank in range(3)]
    assert [len(batch.ids) for batch in batches] == [1, 1, 1]
    assert [int((batch.targets != IGNORE_INDEX).sum()) for batch in batches].count(0) == 1
    assert [record.message for record in caplog.records] == ["some processes have no row to compute"]
    whole = wide_loader(text, "text", rows=2).next_batch()
    assert merge_states(batch.state or {} for batch in batches) == whole.state


def test_coverage_adds_up_over_the_ranks(text: TextDataset) -> None:
    ranks = [wide_loader(text, "text", rank=rank, world_size=3) for rank in range(3)]
    whole = wide_loader(text, "text")
    for _ in range(18):
        expected = whole.next_batch().coverage
        parts = [rank.next_batch().coverage for rank in ranks]
        for name, value in expected.items():
            assert sum(part[name] for part in parts) == pytest.approx(value)
        assert expected["epoch"] + expected["unseen"] >= 1 - 1e-9
    assert expected["epoch"] > 1
    assert expected["unseen"] < 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
def test_pinned_batches_are_the_same_batches(text: TextDataset) -> None:
    pinned, plain = wide_loader(text, "text", pin_memory=True).next_batch(), wide_loader(text, "text").next_batch()
    assert pinned.ids.is_pinned()
    assert pinned.targets.is_pinned()
    assert same(pinned, plain)
