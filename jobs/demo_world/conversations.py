"""Conversations for fine-tuning, and held-out conversations of the same kinds."""

import random
from collections.abc import Iterator, Mapping
from typing import Any

from jobs.demo_world import fact_questions, refusals, tool_questions
from jobs.demo_world.chitchat import CHITCHAT, small_talk
from jobs.demo_world.exchange import Exchange
from jobs.demo_world.seeding import generator
from jobs.demo_world.tables import Split

# Shares of the kinds, in percent. Counting and arithmetic are frequent because copying takes the most practice. Next
# come questions about facts, in both directions. The other kinds are rare: they have few different sentences, and a
# model soon learns these by heart.
CONVERSATION_MIX: Mapping[str, float] = {
    "counting": 24,
    "arithmetic": 21,
    "fact": 16,
    "followup": 15,
    "refusal": 7,
    "mixed": 5,
    "identity": 8,
    "greeting": 3,
    "smalltalk": 1,
}

_MIXED_KINDS = ("counting", "arithmetic", "fact", "fact", "refusal", "greeting", "identity", "smalltalk")

# Share of questions without capitals and final punctuation. People type like that too.
_SLOPPY_SHARE = 0.1
_OPENER_SHARE = 0.08
# Share of conversations with a system message. Many API clients send a system message, and it must not confuse the
# model.
_SYSTEM_SHARE = 0.04


def conversations(
    split: Split, seed: int, n: int, mix: Mapping[str, float] = CONVERSATION_MIX
) -> Iterator[dict[str, Any]]:
    """Generate ``n`` conversations, each with ``messages`` and ``kind``.

    Equal arguments give equal conversations. A smaller ``n`` gives the first ``n`` of the same conversations. ``mix``
    has the weight of each kind; kinds that are not in ``mix`` do not occur. The split ``heldout`` uses phrasings,
    numbers, words and unknown names that ``train`` never contains. The splits have no user message in common, whatever
    the seeds.
    """
    rng = generator(f"conversations/{split}", seed)
    kinds, weights = tuple(mix), tuple(mix.values())
    for _ in range(n):
        kind = rng.choices(kinds, weights)[0]
        yield {"kind": kind, "messages": _messages(rng, draw(rng, split, kind))}


def draw(rng: random.Random, split: Split, kind: str) -> list[Exchange]:
    """Draw the exchanges of one conversation. An unknown kind raises KeyError."""
    if kind == "mixed":
        parts = rng.choices(_MIXED_KINDS, k=rng.choice((2, 2, 3)))
        return [exchange for part in parts for exchange in draw(rng, split, part)]
    if kind == "followup":
        return [_casual(rng, exchange) for exchange in fact_questions.follow_up(rng, split)]
    exchange = {
        "identity": lambda: small_talk(rng, split, CHITCHAT.identity),
        "greeting": lambda: small_talk(rng, split, CHITCHAT.greetings),
        "smalltalk": lambda: small_talk(rng, split, CHITCHAT.smalltalk),
        "fact": lambda: fact_questions.about_facts(rng, split),
        "refusal": lambda: refusals.refusal(rng, split),
        "arithmetic": lambda: tool_questions.calculation(rng, split),
        "counting": lambda: tool_questions.count(rng, split),
    }[kind]()
    if kind not in ("greeting", "smalltalk") and rng.random() < _OPENER_SHARE:
        exchange = exchange.asked(f"{rng.choice(CHITCHAT.openers.of(split))} {exchange.question}")
    return [_casual(rng, exchange)]


def _casual(rng: random.Random, exchange: Exchange) -> Exchange:
    if rng.random() >= _SLOPPY_SHARE:
        return exchange
    return exchange.asked(exchange.question.lower().rstrip("?.!"))


def _messages(rng: random.Random, drawn: list[Exchange]) -> list[dict[str, Any]]:
    messages = [message for exchange in drawn for message in exchange.messages]
    if rng.random() < _SYSTEM_SHARE:
        messages.insert(0, {"role": "system", "content": rng.choice(CHITCHAT.system_messages)})
    return messages
