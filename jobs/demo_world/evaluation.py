"""The evaluation set: held-out conversations whose last answer a program can check."""

import dataclasses
import random
import re
from collections.abc import Collection
from typing import Any

from jobs.demo_world.conversations import draw
from jobs.demo_world.seeding import generator
from jobs.demo_world.tool_questions import calculation

# Number of conversations of each kind, out of 212. Each kind has at least 12, because few answers say little about a
# kind: if users teach a finished model by a lesson, its gate compares the share of right answers of each kind.
EVALUATION_MIX = {
    "identity": 12,
    "greeting": 12,
    "smalltalk": 14,
    "fact": 16,
    "followup": 12,
    "town": 12,
    "talk": 12,
    "arithmetic": 12,
    "expression": 14,
    "decimal": 12,
    "comparison": 12,
    "everyday": 12,
    "problem": 12,
    "counting": 12,
    "spelling": 12,
    "refusal": 12,
    "unsure": 12,
}

# A conversation that the set has already is drawn again, but only until this many were drawn, because a kind with few
# phrasings, such as greeting, may have no other conversation.
_TRIES = 200

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w)")


@dataclasses.dataclass(frozen=True)
class EvalItem:
    """A conversation up to the user's last message, and the conditions for a right answer.

    Attributes:
        expected, forbidden, requires_tool: see :class:`jobs.demo_world.exchange.Exchange`.
        reference: content of an assistant message that answers rightly.
    """

    kind: str
    messages: tuple[dict[str, Any], ...]
    expected: tuple[str, ...]
    forbidden: tuple[str, ...]
    requires_tool: bool
    reference: str | list[dict[str, str]]


def evaluation_set(n: int = 212, seed: int = 0, kinds: Collection[str] | None = None) -> list[EvalItem]:
    """Generate ``n`` held-out conversations, with the shares of :data:`EVALUATION_MIX`.

    No conversation repeats, except in a kind that runs out of phrasings. No training text contains the operands of the
    kind ``arithmetic``; :mod:`expressions` says how the other calculations are held out. If ``kinds`` is given, only
    the conversations of these kinds are returned, so the result may have fewer than ``n``.
    """
    rng = generator("evaluation", seed)
    items: list[EvalItem] = []
    asked: set[str] = set()
    for kind, wanted in _counts(n).items():
        for _ in range(wanted):
            item = _fresh_item(rng, kind, asked)
            asked.add(_context(item))
            items.append(item)
    return [item for item in items if kinds is None or item.kind in kinds]


def check(item: EvalItem, text: str, used_tool: bool) -> bool:
    """Whether an answer is right. ``text`` is the visible text of the answer, without Python code and its output."""
    if item.requires_tool and not used_tool:
        return False
    if item.requires_tool and _NUMBER.fullmatch(item.expected[0]):
        # Only the last number is compared, because an answer may first repeat the numbers of the question.
        numbers = _NUMBER.findall(text)
        return bool(numbers) and numbers[-1] in item.expected
    return _contains_any(text, item.expected) and not _contains_any(text, item.forbidden)


def _counts(n: int) -> dict[str, int]:
    """Number of conversations of each kind, ``n`` in total. The shares with the largest fractions are rounded up."""
    total = sum(EVALUATION_MIX.values())
    counts = {kind: n * share // total for kind, share in EVALUATION_MIX.items()}
    by_remainder = sorted(EVALUATION_MIX, key=lambda kind: -(n * EVALUATION_MIX[kind] % total))
    for kind in by_remainder[: n - sum(counts.values())]:
        counts[kind] += 1
    return counts


def _fresh_item(rng: random.Random, kind: str, asked: set[str]) -> EvalItem:
    for _ in range(_TRIES):
        if kind == "arithmetic":
            drawn = [calculation(rng, "heldout", reserved_share=1.0)]
        else:
            drawn = draw(rng, "heldout", kind)
        *messages, reference = [message for exchange in drawn for message in exchange.messages]
        last = drawn[-1]
        item = EvalItem(kind, tuple(messages), last.expected, last.forbidden, last.requires_tool, reference["content"])
        if _context(item) not in asked:
            break
    return item


def _context(item: EvalItem) -> str:
    return "\n".join(str(message["content"]) for message in item.messages)


def _contains_any(text: str, phrases: tuple[str, ...]) -> bool:
    return any(re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) for phrase in phrases)
