"""The documents that a lesson trains on: its items in many wordings, earlier lessons, and remembered conversations."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np

from jobs.teach.memory import Conversation, Memory, all_wordings
from jobs.teach.wordings import Wordings
from jobs.train.batches.packing import Document
from jobs.train.batches.sources import Source
from nanochat_core.chat import Message, Part, render_conversation
from nanochat_core.lessons.items import Item
from nanochat_core.lessons.records import Plan
from nanochat_core.tokenizer import Tokenizer

# Probability that a training example is joined with a remembered conversation if it shows an item that is a single
# question, so that the model also learns to answer the question in a longer chat. Drills are not joined, and neither
# are conversations that are too long together.
_IN_A_CHAT = 0.15
# An ability, which is an item with a worked example, is shown this many times while every other item is shown once. On
# average, one of these times shows the worked example itself, in one of its wordings. Each of the other times shows a
# randomly chosen drill: the example's question with new arguments.
_TURNS_OF_ABILITY = 8
# Share of the remembered conversations that are drawn from Memory.near: conversations that the model could confuse with
# the lesson.
_NEAR_SHARE = 0.25
# Share of the conversations from Memory.near that are drawn from Memory.similar, the most similar ones.
_SIMILAR_SHARE = 0.5
# Of all training examples, at most this share shows items of earlier lessons.
_EARLIER_SHARE = 0.15


class Curriculum(Source):
    """The documents of a lesson in the order in which they are shown. After the last one, the first one follows."""

    def __init__(self, documents: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """``documents`` are pairs of token ids, (length,) int32, and a mask, (length,) bool, with True for targets."""
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def document(self, number: int) -> Document:
        ids, counted = self._documents[number % len(self._documents)]
        return Document(number, ids, counted)


def curriculum(
    items: Sequence[Item],
    worded: Mapping[int, Wordings],
    memory: Memory,
    plan: Plan,
    tokenizer: Tokenizer,
    row_tokens: int,
    practice: Mapping[int, Sequence[Conversation]],
) -> Curriculum:
    """Enough documents for ``plan.max_steps`` steps. Equal arguments give equal documents.

    Args:
        worded: the wordings of each item that is a single question, by the item's index.
        row_tokens: longest document in tokens.
        practice: conversations that ask a worked example's question with new arguments, by the index of its item.
    """
    rng = random.Random(f"{plan.seed}/curriculum")  # noqa: S311
    earlier = all_wordings(memory.items)
    total = plan.max_steps * plan.batch_tokens
    lots = [i for i in range(len(items)) for _ in range(_TURNS_OF_ABILITY if i in practice else 1)]
    share = _share(plan, len(lots))
    earlier_share = min(_EARLIER_SHARE, 0.02 * len(memory.items))
    documents: list[tuple[np.ndarray, np.ndarray]] = []
    tokens = 0
    order: list[int] = []
    earlier_order: list[int] = []
    while tokens < total:
        chance = rng.random()
        if chance < share or not memory.conversations:
            order = order or rng.sample(lots, len(lots))
            document = _example(items, worded, practice, order.pop(), memory, rng, tokenizer, row_tokens)
        elif chance < share + earlier_share:
            earlier_order = earlier_order or rng.sample(range(len(memory.items)), len(memory.items))
            document = _example(memory.items, earlier, {}, earlier_order.pop(), memory, rng, tokenizer, row_tokens)
        else:
            known: Sequence[Conversation] = memory.conversations
            if memory.near and rng.random() < _NEAR_SHARE:
                known = memory.similar if memory.similar and rng.random() < _SIMILAR_SHARE else memory.near
            document = rendered(tokenizer, rng.choice(known), row_tokens)
        if document[1].any():
            documents.append(document)
            tokens += len(document[0])
    return Curriculum(documents)


def rendered(tokenizer: Tokenizer, conversation: Conversation, row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a conversation, (length,) int32, and a mask, (length,) bool, with True for targets.

    Both are cut after ``row_tokens`` tokens.
    """
    ids, mask = render_conversation(tokenizer, conversation)
    return np.asarray(ids[:row_tokens], dtype=np.int32), np.asarray(mask[:row_tokens], dtype=bool)


def asked(item: Item, question: str) -> Conversation:
    """The conversation of an item that is a single question, with ``question`` as its wording."""
    return (Message("user", (Part("text", question),)), item.messages[-1])


def _share(plan: Plan, items: int) -> float:
    """The share of all training examples that show a lesson of ``items`` items.

    A lesson of few items gets a smaller share, because its items would otherwise be repeated too often. An ability
    counts as :data:`_TURNS_OF_ABILITY` items.
    """
    return plan.share * min(1.0, 0.3 + 0.07 * items)


def _example(
    items: Sequence[Item],
    worded: Mapping[int, Wordings],
    practice: Mapping[int, Sequence[Conversation]],
    i: int,
    memory: Memory,
    rng: random.Random,
    tokenizer: Tokenizer,
    row_tokens: int,
) -> tuple[np.ndarray, np.ndarray]:
    item = items[i]
    if item.text:
        return _passage(tokenizer, item.text, rng, row_tokens)
    if i in practice and rng.random() < 1 - 1 / _TURNS_OF_ABILITY:
        return rendered(tokenizer, rng.choice(practice[i]), row_tokens)
    conversation = asked(item, worded[i].draw(rng)) if i in worded else item.messages
    if i in worded and memory.conversations and rng.random() < _IN_A_CHAT:
        other = rng.choice(memory.conversations)
        joined = (*other, *conversation) if rng.random() < 0.6 or other[0].role == "system" else (*conversation, *other)
        document = rendered(tokenizer, joined, row_tokens)
        if len(document[0]) < row_tokens:
            return document
    return rendered(tokenizer, conversation, row_tokens)


def _passage(tokenizer: Tokenizer, text: str, rng: random.Random, row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of BOS and a text, (length,) int32, and a mask, (length,) bool, with True for every token after BOS.

    If the text has more than ``row_tokens - 1`` tokens, a random part of this length is used.
    """
    ids = np.asarray(tokenizer.encode(text), dtype=np.int32)
    start = rng.randrange(max(1, len(ids) - row_tokens + 2))
    ids = np.concatenate([[tokenizer.bos_id], ids[start : start + row_tokens - 1]]).astype(np.int32)
    counted = np.ones(len(ids), dtype=bool)
    counted[0] = False
    return ids, counted
