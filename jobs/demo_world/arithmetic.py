"""Two-operand sums, and which numbers training never sees.

One number in eight between 10 and 9999 is reserved: as a whole number it occurs in no training text, be it as operand,
result or count in a story. Of the pairs of ordinary numbers one in twenty is held out as well, which covers the small
numbers that cannot be reserved.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import operator
import random
import re
from collections.abc import Callable

from jobs.demo_world.facts import world_numbers
from jobs.demo_world.phrasings import Split

_RESERVED_ONE_IN = 8
_HELDOUT_PAIR_ONE_IN = 20
# The example that the documentation shows must be one the model could not memorise.
_ALWAYS_RESERVED = frozenset({1234, 5678})
LARGEST = 9999

# How many digits an operand has: long ones often, because their results take the most practice to copy; short ones
# because people ask for them. Training has more of two digits than people would ask: such a number is one token, and a
# reserved one is never seen as a whole, so that only the others can teach that a number may end there.
_DIGITS = (1, 2, 3, 4)
_TRAINING_WEIGHTS = (2, 5, 4, 5)
_RESERVED_WEIGHTS = (0, 3, 4, 5)

_OPERATIONS: dict[str, Callable[[int, int], int | float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
OPERATORS = tuple(_OPERATIONS)
# Products have the longest results. Division is rarest: its results are floats, and few of them are short.
_OPERATOR_WEIGHTS = (4, 3, 6, 2)
_LONGEST_QUOTIENT = 7


@dataclasses.dataclass(frozen=True)
class Sum:
    """``a symbol b`` and what Python prints for it."""

    a: int
    symbol: str
    b: int

    @property
    def code(self) -> str:
        return f"{self.a} {self.symbol} {self.b}"

    @property
    def result(self) -> str:
        return str(_OPERATIONS[self.symbol](self.a, self.b))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@functools.cache
def reserved_numbers() -> frozenset[int]:
    """Numbers that no training text contains."""
    hashed = (n for n in range(10, LARGEST + 1) if _hash(str(n)) % _RESERVED_ONE_IN == 0)
    return (frozenset(hashed) - world_numbers()) | _ALWAYS_RESERVED


@functools.cache
def _reserved_by_digits(digits: int) -> tuple[int, ...]:
    return tuple(sorted(n for n in reserved_numbers() if len(str(n)) == digits))


def is_heldout_pair(a: int, b: int) -> bool:
    """Whether two ordinary numbers may only be combined in held-out conversations; their order does not matter."""
    return _hash(f"{min(a, b)},{max(a, b)}") % _HELDOUT_PAIR_ONE_IN == 0


def contains_reserved_number(text: str) -> bool:
    return any(int(digits) in reserved_numbers() for digits in re.findall(r"\d+", text))


def training_number(rng: random.Random, smallest: int = 1, largest: int = LARGEST) -> int:
    """A number that training may see, its number of digits drawn first."""
    while True:
        digits = rng.choices(_DIGITS, _TRAINING_WEIGHTS)[0]
        n = rng.randrange(10 ** (digits - 1), 10**digits)
        if smallest <= n <= largest and n not in reserved_numbers():
            return n


def reserved_number(rng: random.Random) -> int:
    """A number that training never sees."""
    return rng.choice(_reserved_by_digits(rng.choices(_DIGITS, _RESERVED_WEIGHTS)[0]))


def draw_sum(rng: random.Random, split: Split, symbol: str | None = None, *, reserved_share: float = 0.8) -> Sum:
    """A sum that only ``split`` may contain.

    Args:
        symbol: one of :data:`OPERATORS`; by default drawn.
        reserved_share: of the held-out sums, how many have two reserved operands; the others are held-out pairs of
            ordinary numbers.
    """
    symbol = symbol or rng.choices(OPERATORS, _OPERATOR_WEIGHTS)[0]
    reserved = split == "heldout" and rng.random() < reserved_share
    draw = reserved_number if reserved else training_number
    while True:
        drawn = _draw_quotient(rng, draw) if symbol == "/" else Sum(draw(rng), symbol, draw(rng))
        if drawn.symbol == "-" and drawn.a < drawn.b and rng.random() < 0.8:
            drawn = Sum(drawn.b, "-", drawn.a)  # most people take the smaller from the larger
        if _belongs(drawn, split, reserved):
            return drawn


def _draw_quotient(rng: random.Random, draw: Callable[[random.Random], int]) -> Sum:
    """Usually a division without remainder, otherwise one with a short decimal fraction."""
    while True:
        b = draw(rng)
        if b > LARGEST // 2:
            continue
        a = b * rng.randint(2, LARGEST // b) if rng.random() < 0.8 else draw(rng)
        quotient = Sum(a, "/", b)
        if len(quotient.result) <= _LONGEST_QUOTIENT and "e" not in quotient.result:
            return quotient


def _belongs(drawn: Sum, split: Split, reserved: bool) -> bool:
    if reserved:
        return {drawn.a, drawn.b} <= reserved_numbers()
    if contains_reserved_number(f"{drawn.code} {drawn.result}"):
        return False
    return is_heldout_pair(drawn.a, drawn.b) == (split == "heldout")
