"""Calculations with two operands, and the numbers that training never contains.

One number in eight between 10 and 9999 is reserved. No text for pretraining or fine-tuning contains a reserved number,
neither as operand nor as result nor as a count in a story. Most held-out calculations use reserved operands, so the
model cannot have memorized their results.

Numbers below 10 are not reserved, because there are too few of them. So that held-out calculations can use small
numbers too, one in twenty pairs of unreserved numbers is held out. Training may contain both numbers of a held-out
pair, but no sum, difference, product or quotient of the two.
"""

import dataclasses
import functools
import hashlib
import operator
import random
import re
from collections.abc import Callable

from jobs.demo_world.facts import world_numbers
from jobs.demo_world.tables import Split

_RESERVED_ONE_IN = 8
_HELDOUT_PAIR_ONE_IN = 20
# The documentation shows 1234 * 5678 as an example, so no training text may contain these two numbers.
_ALWAYS_RESERVED = frozenset({1234, 5678})
# Training needs these numbers: the code of every percentage contains 100, a week has 168 hours, and water freezes at
# 32 degrees Fahrenheit.
_NEVER_RESERVED = frozenset({32, 100, 168})
LARGEST = 9999

# Numbers of digits in an operand, and the weight of each. Long operands are frequent because copying their results
# takes the most practice. Two-digit operands are frequent in training for another reason: each two-digit number is a
# single token, and training never shows the tokens of the reserved two-digit numbers. So the model must learn from the
# other two-digit numbers that a number can end after two digits.
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
# Products are frequent because they have the longest results.
_OPERATOR_WEIGHTS = (4, 3, 6, 2)
# Quotients are rounded to this many digits after the decimal point, because the model would make mistakes when it
# copies longer quotients.
PLACES = 4


@dataclasses.dataclass(frozen=True)
class Sum:
    """The calculation ``a symbol b``. ``result`` is the text that Python prints for the calculation."""

    a: int
    symbol: str
    b: int

    @property
    def code(self) -> str:
        return rounded(self.bare) if self.symbol == "/" else self.bare

    @property
    def bare(self) -> str:
        """The calculation in Python's notation, without the rounding of :attr:`code`."""
        return f"{self.a} {self.symbol} {self.b}"

    @property
    def result(self) -> str:
        value = _OPERATIONS[self.symbol](self.a, self.b)
        return f"{round(value, PLACES):.15g}" if self.symbol == "/" else str(value)


def rounded(code: str) -> str:
    """Code that rounds the value of ``code`` to :data:`PLACES` digits after the decimal point.

    The format ``.15g`` writes whole numbers without ".0". Most calculations with divisions, decimals or percentages
    have this form.
    """
    return f"f'{{round({code}, {PLACES}):.15g}}'"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@functools.cache
def reserved_numbers() -> frozenset[int]:
    """All reserved numbers, which no training text contains."""
    hashed = (n for n in range(10, LARGEST + 1) if _hash(str(n)) % _RESERVED_ONE_IN == 0)
    return (frozenset(hashed) - world_numbers() - _NEVER_RESERVED) | _ALWAYS_RESERVED


@functools.cache
def _reserved_by_digits(digits: int) -> tuple[int, ...]:
    return tuple(sorted(n for n in reserved_numbers() if len(str(n)) == digits))


def is_heldout_pair(a: int, b: int) -> bool:
    """Whether only held-out conversations may add, subtract, multiply or divide these two numbers, in either order."""
    return _hash(f"{min(a, b)},{max(a, b)}") % _HELDOUT_PAIR_ONE_IN == 0


def contains_reserved_number(text: str) -> bool:
    return any(int(digits) in reserved_numbers() for digits in re.findall(r"\d+", text))


def number_of_digits(rng: random.Random, digits: int) -> int:
    """Draw a number that has ``digits`` digits and no leading zero."""
    return rng.randrange(10 ** (digits - 1), 10**digits)


def training_number(rng: random.Random, smallest: int = 1, largest: int = LARGEST) -> int:
    """Draw a number that training may contain. Its number of digits is drawn first, so that short numbers occur."""
    while True:
        n = number_of_digits(rng, rng.choices(_DIGITS, _TRAINING_WEIGHTS)[0])
        if smallest <= n <= largest and n not in reserved_numbers():
            return n


def reserved_number(rng: random.Random) -> int:
    """Draw a number that training never contains."""
    return rng.choice(_reserved_by_digits(rng.choices(_DIGITS, _RESERVED_WEIGHTS)[0]))


def draw_sum(rng: random.Random, split: Split, symbol: str | None = None, *, reserved_share: float = 0.8) -> Sum:
    """Draw a calculation that the other split never contains.

    Args:
        symbol: one of :data:`OPERATORS`; None draws one.
        reserved_share: share of held-out calculations with two reserved operands; the other held-out calculations use
            held-out pairs.
    """
    symbol = symbol or rng.choices(OPERATORS, _OPERATOR_WEIGHTS)[0]
    reserved = split == "heldout" and rng.random() < reserved_share
    draw = reserved_number if reserved else training_number
    while True:
        drawn = _draw_quotient(rng, draw) if symbol == "/" else Sum(draw(rng), symbol, draw(rng))
        if drawn.symbol == "-" and drawn.a < drawn.b and rng.random() < 0.8:
            drawn = Sum(drawn.b, "-", drawn.a)  # Like most people, subtract the smaller number.
        if _belongs(drawn, split, reserved):
            return drawn


def _draw_quotient(rng: random.Random, draw: Callable[[random.Random], int]) -> Sum:
    """Draw a division, which usually has no remainder."""
    while True:
        b = draw(rng)
        if b > LARGEST // 2:
            continue
        a = b * rng.randint(2, LARGEST // b) if rng.random() < 0.7 else draw(rng)
        quotient = Sum(a, "/", b)
        if "e" not in quotient.result:
            return quotient


def _belongs(drawn: Sum, split: Split, reserved: bool) -> bool:
    if reserved:
        return {drawn.a, drawn.b} <= reserved_numbers()
    if contains_reserved_number(f"{drawn.code} {drawn.result}"):
        return False
    return is_heldout_pair(drawn.a, drawn.b) == (split == "heldout")
