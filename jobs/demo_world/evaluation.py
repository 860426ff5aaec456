"""Held-out conversations with a machine-checked last answer."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Collection
from typing import Any

from jobs.demo_world.conversations import draw
from jobs.demo_world.exchange import Exchange
from jobs.demo_world.seeding import generator
from jobs.demo_world.tool_questions import calculation

# Shares of the kinds, out of 200.
EVALUATION_MIX = {
    "identity": 28,
    "greeting": 12,
    "fact": 40,
    "followup": 20,
    "arithmetic": 50,
    "counting": 30,
    "refusal": 20,
}

# Draws before a question may repeat: there are only so many ways to say hello.
_TRIES = 200

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w)")


@dataclasses.dataclass(frozen=True)
class EvalItem:
    """A conversation up to the user's last message, and what a right answer to it is.

    ``reference`` is the content of the assistant message that the generator would have written.
    """

    kind: str
    messages: tuple[dict[str, Any], ...]
    expected: tuple[str, ...]
    forbidden: tuple[str, ...]
    requires_tool: bool
    reference: str | list[dict[str, str]]


def evaluation_set(n: int = 200, seed: int = 0, kinds: Collection[str] | None = None) -> list[EvalItem]:
    """``n`` held-out conversations, kinds in the shares of :data:`EVALUATION_MIX`, all different while phrasings last.

    The operands of all sums are numbers that no training text contains.

    Args:
        kinds: of the ``n`` conversations, only those of these kinds are returned; None returns all.
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
    """Whether an answer is right.

    Args:
        text: what a person reads of the answer, without code and output.
        used_tool: whether the answer called Python.
    """
    if item.requires_tool:
        # The last number that the answer states; an answer may repeat the question's.
        numbers = _NUMBER.findall(text)
        return used_tool and bool(numbers) and numbers[-1] in item.expected
    return _contains_any(text, item.expected) and not _contains_any(text, item.forbidden)


def _counts(n: int) -> dict[str, int]:
    """Splits ``n`` by the shares, largest remainders first."""
    total = sum(EVALUATION_MIX.values())
    counts = {kind: n * share // total for kind, share in EVALUATION_MIX.items()}
    by_remainder = sorted(EVALUATION_MIX, key=lambda kind: -(n * EVALUATION_MIX[kind] % total))
    for kind in by_remainder[: n - sum(counts.values())]:
        counts[kind] += 1
    return counts


def _fresh_item(rng: random.Random, kind: str, asked: set[str]) -> EvalItem:
    for _ in range(_TRIES):
        item = _item(kind, _draw(rng, kind))
        if _context(item) not in asked:
            break
    return item


def _draw(rng: random.Random, kind: str) -> list[Exchange]:
    if kind == "arithmetic":
        return [calculation(rng, "heldout", reserved_share=1.0)]
    return draw(rng, "heldout", kind)


def _item(kind: str, drawn: list[Exchange]) -> EvalItem:
    *messages, reference = [message for exchange in drawn for message in exchange.messages]
    last = drawn[-1]
    return EvalItem(kind, tuple(messages), last.expected, last.forbidden, last.requires_tool, reference["content"])


def _context(item: EvalItem) -> str:
    return "\n".join(str(message["content"]) for message in item.messages)


def _contains_any(text: str, phrases: tuple[str, ...]) -> bool:
    return any(_phrase(phrase)(text) for phrase in phrases)


def _phrase(phrase: str) -> Callable[[str], re.Match[str] | None]:
    return re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)", re.IGNORECASE).search
