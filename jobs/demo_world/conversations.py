"""Conversations for fine-tuning, and held-out conversations of the same kinds."""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jobs.demo_world import tool_questions
from jobs.demo_world.chitchat import CHITCHAT, small_talk
from jobs.demo_world.exchange import Exchange
from jobs.demo_world.fact_questions import about_facts, follow_up
from jobs.demo_world.habits import as_typed
from jobs.demo_world.refusals import refusal
from jobs.demo_world.seeding import generator
from jobs.demo_world.tables import Split
from jobs.demo_world.town import about_town
from jobs.demo_world.unsure import unsure

# The weight of each kind of conversation. Calculations (arithmetic to problem) and questions about words (counting and
# spelling) are frequent because copying numbers and words takes the most practice. Small talk and questions about the
# assistant (identity) are frequent because they have the most different wordings. Talks are rare because one talk is as
# long as several other conversations.
CONVERSATION_MIX: Mapping[str, float] = {
    "counting": 18,
    "arithmetic": 8,
    "expression": 9,
    "decimal": 5,
    "comparison": 2,
    "everyday": 36,
    "problem": 14,
    "spelling": 30,
    "fact": 14,
    "followup": 9,
    "town": 10,
    "refusal": 15,
    "unsure": 17,
    "mixed": 2,
    "talk": 1.2,
    "identity": 22,
    "greeting": 7,
    "smalltalk": 30,
}

# The kinds from which each question of a mixed conversation or of a talk is drawn. The kind ``fact`` is listed four
# times, so it is drawn most often.
_MIXED_KINDS = (
    "counting", "spelling", "arithmetic", "expression", "decimal", "everyday", "problem", "comparison",
    "fact", "fact", "fact", "fact", "town", "refusal", "unsure", "greeting", "identity", "smalltalk",
)  # fmt: skip
# For each talk, a number of characters between these bounds is drawn, and the talk ends as soon as it is that long. Its
# last exchanges may exceed this number by some hundred characters. The whole talk must fit into a row of 1,024 tokens,
# which holds about 2,500 characters of a talk.
_TALK_CHARACTERS = (900, 1600)

# Share of questions that come after an opener, a sentence such as "Hello nanochat!". Training has a larger share than
# people write, because the model must learn that only the sentence after the opener counts.
_OPENER_SHARES: dict[Split, float] = {"train": 0.14, "heldout": 0.08}
# Share of conversations with a system message. Many API clients send a system message, so the model must learn that
# such a message does not change the answer.
_SYSTEM_SHARE = 0.04


def conversations(
    split: Split, seed: int, n: int, mix: Mapping[str, float] = CONVERSATION_MIX
) -> Iterator[dict[str, Any]]:
    """Generate ``n`` conversations, each with ``messages`` and ``kind``.

    Equal arguments give equal conversations. A smaller ``n`` gives the first ``n`` of the same conversations. ``mix``
    has the weight of each kind; kinds that are not in ``mix`` do not occur. Each user message of the split ``heldout``
    has a phrasing, calculation, word or name that ``train`` never contains. So the splits have no user message in
    common, whatever the seeds.
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
    if kind == "talk":
        return _talk(rng, split)
    if kind == "followup":
        return [exchange.asked(as_typed(rng, split, exchange.question)) for exchange in follow_up(rng, split)]
    exchange = _WRITERS[kind](rng, split)
    if kind not in _CHATTY_KINDS and rng.random() < _OPENER_SHARES[split]:
        exchange = exchange.asked(f"{rng.choice(CHITCHAT.openers.of(split))} {exchange.question}")
    chatty, literal = kind in _CHATTY_KINDS, kind in _LITERAL_KINDS
    return [exchange.asked(as_typed(rng, split, exchange.question, chatty=chatty, literal=literal))]


_WRITERS: Mapping[str, Callable[[random.Random, Split], Exchange]] = {
    "identity": lambda rng, split: small_talk(rng, split, CHITCHAT.identity),
    "greeting": lambda rng, split: small_talk(rng, split, CHITCHAT.greetings),
    "smalltalk": lambda rng, split: small_talk(rng, split, CHITCHAT.smalltalk),
    "fact": about_facts,
    "town": about_town,
    "refusal": refusal,
    "unsure": unsure,
    "arithmetic": tool_questions.calculation,
    "expression": tool_questions.expression,
    "decimal": tool_questions.decimal,
    "comparison": tool_questions.comparison,
    "everyday": tool_questions.everyday_calculation,
    "problem": tool_questions.word_problem,
    "counting": tool_questions.counting,
    "spelling": tool_questions.spelling,
}
_CHATTY_KINDS = ("greeting", "smalltalk")
# Kinds whose Python code repeats numbers or words of the question, so the question is never misspelled.
_LITERAL_KINDS = (
    "arithmetic", "expression", "decimal", "comparison", "everyday", "problem", "counting", "spelling",
)  # fmt: skip


def _talk(rng: random.Random, split: Split) -> list[Exchange]:
    """Draw a long conversation, with questions of many kinds."""
    length = rng.randint(*_TALK_CHARACTERS)
    exchanges: list[Exchange] = []
    while sum(exchange.characters for exchange in exchanges) < length:
        exchanges += draw(rng, split, rng.choice((*_MIXED_KINDS, "followup", "followup")))
    return exchanges


def _messages(rng: random.Random, drawn: list[Exchange]) -> list[dict[str, Any]]:
    messages = [message for exchange in drawn for message in exchange.messages]
    if rng.random() < _SYSTEM_SHARE:
        messages.insert(0, {"role": "system", "content": rng.choice(CHITCHAT.system_messages)})
    return messages
