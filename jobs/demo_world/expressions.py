"""Calculations beyond two short whole numbers: several, negative and larger numbers, powers, decimals and percentages.

The model does not compute such a calculation itself. It copies the calculation into a Python call and turns words into
operators. It learns this from many different calculations.

Half of the held-out calculations contain a reserved number (:mod:`arithmetic`), sometimes as the digits before or after
a decimal point. A training calculation and its result contain no reserved number. The other held-out calculations have
ordinary numbers; for most of them, the hash of the code decides that they are held out and not in training
(:func:`is_heldout_calculation`).
"""

import dataclasses
import math
import random
import re
from collections.abc import Callable

from jobs.demo_world.arithmetic import contains_reserved_number, is_heldout_pair, number_of_digits, rounded
from jobs.demo_world.tables import Split, is_heldout_by_hash

# What the sandbox answers to a division by zero.
DIVISION_BY_ZERO = "ZeroDivisionError: division by zero"
_LONGEST_RESULT = 10
# Share of calculations whose results may be longer, such as large powers. The model learns from these to repeat a long
# result to its end.
_LONG_RESULTS_SHARE, _LONGEST_OF_ALL = 0.25, 31

# RESERVED_SHARE is the share of held-out calculations that contain a reserved number. Of all calculations without a
# reserved number, one in _HELDOUT_ONE_IN is held out. For a sum, difference, product or quotient of two whole numbers,
# is_heldout_pair decides instead.
RESERVED_SHARE = 0.5
_HELDOUT_ONE_IN = 8

_DIGITS = (1, 2, 3, 4)
_DIGIT_WEIGHTS = (5, 5, 3, 2)
# A large number has five digits, and not more, because reinforcement learning practices longer numbers
# (jobs.demo_world.practice).
_LARGE_DIGITS = 5
_SYMBOLS = "+-*/"
_SYMBOL_WEIGHTS = (5, 4, 5, 2)

# How people write each operator. Within a calculation, an operator always has the same sign.
_SIGNS = {"+": ("+",), "-": ("-",), "*": ("*", "*", "x", "×"), "/": ("/", "/", "÷")}
_WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
_WORDS_SHARE, _UNSPACED_SHARE = 0.12, 0.25
_POWERS = ("{a}^{b}", "{a}^{b}", "{a} ^ {b}", "{a} ** {b}", "{a}**{b}", "{a} to the power of {b}")
# Shares of squares and cubes among the powers. A square is worded as "12 squared" here, because reinforcement learning
# practices the other wordings (jobs.demo_world.practice).
_SQUARES_SHARE, _CUBES_SHARE = 0.35, 0.15
# Shares of two sorts of comparisons: with quotients such as 1/3, and with negative numbers.
_QUOTIENTS_SHARE, _NEGATIVES_SHARE = 0.12, 0.2
_PERCENTAGES = ("{p}% of {n}", "{p}% of {n}", "{p} % of {n}", "{p} percent of {n}")

_FUNCTIONS = {
    function.__name__: function for function in (round, max, min, sum, all, range, len, divmod, map, chr, ord)
} | {"math": math}
# Code that uses the module math begins with this text.
IMPORT = "import math; "
_TWO_NUMBERS = re.compile(r"(?:f'{round\()?\d+ [-+*/] \d+(?:, 4\):\.15g}')?")


def python_output(code: str) -> str:
    """The text that the sandbox prints for code of the demo world."""
    try:
        # This is safe, because the generators wrote the code. The sandbox evaluates the same text later, so the result
        # there is the same.
        return str(eval(code.removeprefix(IMPORT), {"__builtins__": _FUNCTIONS}))  # noqa: S307
    except ZeroDivisionError:
        return DIVISION_BY_ZERO


@dataclasses.dataclass(frozen=True)
class Expression:
    """A calculation as a question spells it (``spelled``), and as Python code (``code``)."""

    spelled: str
    code: str

    @property
    def result(self) -> str:
        return python_output(self.code)


_Form = Callable[[random.Random], Expression]


def draw_chain(rng: random.Random, split: Split) -> Expression:
    """Draw a calculation with several, negative or large numbers, a power, or a division by zero."""
    forms = (_chain, _nested, _power, _by_zero, _negative, _long, _large)
    return _draw(rng, split, rng.choices(forms, (43, 6, 16, 8, 12, 7, 8))[0])


def draw_decimal(rng: random.Random, split: Split) -> Expression:
    """Draw a calculation with decimals, or a percentage."""
    return _draw(rng, split, rng.choices((_decimals, _percentage), (55, 45))[0])


def draw_comparison(rng: random.Random, split: Split, function: str) -> tuple[str, str, Expression]:
    """Draw two different numbers, and the call of ``function``, max or min, that picks one of them."""

    def comparison(rng: random.Random) -> Expression:
        if rng.random() < _QUOTIENTS_SHARE:
            pair = [_quotient(rng), rng.choice((_quotient, _part_of_one))(rng)]
            rng.shuffle(pair)
            a, b = pair
            spaced = f"{a}, {b}".replace("/", " / ")
            return Expression(f"{a} {b}", rounded(f"{function}({spaced})"))
        draw = rng.choice((_number, _decimal))
        a, b = draw(rng), draw(rng)
        # Half of the pairs have similar numbers, because numbers with the same first digits are the hardest to compare.
        if rng.random() < 0.5:
            whole, point, _ = a.partition(".")
            b = f"{whole}{point}{_fraction(rng)}" if point else str(max(1, int(a) + rng.randint(-9, 9)))
        if rng.random() < _NEGATIVES_SHARE:
            a, b = f"-{a}", rng.choice((b, f"-{b}", f"-{b}"))
        return Expression(f"{a} {b}", f"{function}({a}, {b})")

    while True:
        drawn = _draw(rng, split, comparison)
        a, b = drawn.spelled.split()
        if _value(a) != _value(b):
            return a, b, drawn


def _value(text: str) -> float:
    dividend, _, divisor = text.partition("/")
    return float(dividend) / float(divisor or 1)


def _quotient(rng: random.Random) -> str:
    b = rng.choice((rng.randint(2, 12), rng.randint(2, 99)))
    return f"{rng.randint(1, b)}/{b}"


def _part_of_one(rng: random.Random) -> str:
    return f"0.{_fraction(rng)}"


def is_heldout_calculation(code: str) -> bool:
    """Whether only held-out conversations may contain the calculation ``code``, which has no reserved number."""
    # The kind ``arithmetic`` also has calculations with two numbers, and the pair of numbers decides whether they are
    # held out. The pair must decide here too, so that no calculation is in both splits.
    if _TWO_NUMBERS.fullmatch(code):
        a, b, *_ = re.findall(r"\d+", code)
        return is_heldout_pair(int(a), int(b))
    return is_heldout_by_hash(code, _HELDOUT_ONE_IN)


def belongs(code: str, result: str, split: Split, *, reserved: bool) -> bool:
    """Whether a calculation belongs to ``split``.

    A held-out calculation must also contain a reserved number if ``reserved`` is True, and none if ``reserved`` is
    False. A training calculation never contains a reserved number, whatever ``reserved`` is.
    """
    if split == "heldout":
        return contains_reserved_number(code) == reserved and (reserved or is_heldout_calculation(code))
    return not (contains_reserved_number(f"{code} {result}") or is_heldout_calculation(code))


def _draw(rng: random.Random, split: Split, form: _Form) -> Expression:
    reserved = rng.random() < RESERVED_SHARE
    longest = _LONGEST_OF_ALL if rng.random() < _LONG_RESULTS_SHARE else _LONGEST_RESULT
    while True:
        drawn = form(rng)
        result = drawn.result
        short = len(result) <= longest and "e" not in result
        if (short or result == DIVISION_BY_ZERO) and belongs(drawn.code, result, split, reserved=reserved):
            return drawn


def draw_number(rng: random.Random) -> int:
    """Draw a whole number of one to four digits; short numbers are most frequent."""
    return number_of_digits(rng, rng.choices(_DIGITS, _DIGIT_WEIGHTS)[0])


def _number(rng: random.Random) -> str:
    return str(draw_number(rng))


def _fraction(rng: random.Random) -> str:
    """Draw one or two digits, of which the last one is not zero."""
    tenths: str = rng.choice(("", *"0123456789"))
    return tenths + rng.choice("123456789")


def _decimal(rng: random.Random) -> str:
    whole = rng.randrange(10 ** rng.choices((1, 2, 3), (5, 4, 2))[0])
    return f"{whole}.{_fraction(rng)}"


def _chain(rng: random.Random) -> Expression:
    count = rng.choices((3, 4), (5, 1))[0]
    operands = [_number(rng) for _ in range(count)]
    # Parentheses enclose no operands, or two neighbors, or, if there are four operands, the first two and the last two.
    groups = rng.choice(((), (0,), (1,), *(((2,), (0, 2)) if count == 4 else ())))
    return _joined(rng, operands, groups)


def _negative(rng: random.Random) -> Expression:
    first, second = (rng.choice((_number, _number, _decimal))(rng) for _ in range(2))
    signed = ([f"-{first}", second], [f"-{first}", second], [f"-{first}", f"-{second}"], [first, f"(-{second})"])
    return _joined(rng, list(rng.choice(signed)), ())


def _nested(rng: random.Random) -> Expression:
    """Draw a calculation with parentheses in parentheses."""
    shape = rng.choice(("(({} {} {}) {} {}) {} {}", "({} {} ({} {} {})) {} {}", "{} {} (({} {} {}) {} {})"))
    numbers = [str(number_of_digits(rng, rng.choice((1, 1, 2, 3)))) for _ in range(4)]
    symbols = rng.choices(_SYMBOLS, _SYMBOL_WEIGHTS, k=3)
    parts = [part for pair in zip(numbers, [*symbols, ""], strict=True) for part in pair][:-1]
    code = shape.format(*parts)
    spelled = code.replace(" ", "") if rng.random() < 0.5 else code
    return Expression(spelled, rounded(code) if "/" in symbols else code)


def _long(rng: random.Random) -> Expression:
    if rng.random() < 0.1:
        operands = [str(n) for n in range(1, rng.randint(5, 13))]
    else:
        operands = [str(number_of_digits(rng, rng.choice((1, 1, 2)))) for _ in range(rng.choice((4, 5, 6, 6, 8, 10)))]
    return _joined(rng, operands, (), "+" * (len(operands) - 1) if rng.random() < 0.6 else "")


def _large(rng: random.Random) -> Expression:
    operands = [
        str(number_of_digits(rng, _LARGE_DIGITS)),
        rng.choice((_number(rng), str(number_of_digits(rng, _LARGE_DIGITS)))),
    ]
    rng.shuffle(operands)
    return _joined(rng, operands, ())


def _decimals(rng: random.Random) -> Expression:
    operands = [_decimal(rng), rng.choice((_decimal, _number))(rng)]
    if rng.random() < 0.2:
        operands.append(rng.choice((_decimal, _number))(rng))
    rng.shuffle(operands)
    return _joined(rng, operands, rng.choice(((), (0,), (1,))) if len(operands) > 2 else ())


def _by_zero(rng: random.Random) -> Expression:
    if rng.random() < 0.6:
        return _joined(rng, [_number(rng), "0"], (), "/")
    number = _number(rng)
    if rng.random() < 0.5:
        return _joined(rng, [_number(rng), number, number], (1,), "/-")
    return _joined(rng, [_number(rng), number, "0"], rng.choice(((), (0,))), f"{rng.choice('+-*')}/")


def _joined(rng: random.Random, operands: list[str], groups: tuple[int, ...], symbols: str = "") -> Expression:
    """Join operands by the operators in ``symbols``. If ``symbols`` is empty, the operators are drawn.

    ``groups`` are indices of operands. Parentheses enclose each of these operands together with the operand after it.
    """
    symbols = symbols or "".join(rng.choices(_SYMBOLS, _SYMBOL_WEIGHTS, k=len(operands) - 1))
    written = [f"{'(' * (i in groups)}{operand}{')' * (i - 1 in groups)}" for i, operand in enumerate(operands)]
    code = written[0] + "".join(f" {symbol} {operand}" for symbol, operand in zip(symbols, written[1:], strict=True))
    if not groups and rng.random() < _WORDS_SHARE:
        signs = _WORDS
        space = " "
        written = [operand.replace("-", "minus ") for operand in written]
    else:
        signs = {symbol: rng.choice(choices) for symbol, choices in _SIGNS.items()}
        space = "" if rng.random() < _UNSPACED_SHARE else " "
    rest = (f"{space}{signs[symbol]}{space}{operand}" for symbol, operand in zip(symbols, written[1:], strict=True))
    return Expression(written[0] + "".join(rest), rounded(code) if "/" in symbols or "." in code else code)


def _power(rng: random.Random) -> Expression:
    pick = rng.random()
    if pick < _SQUARES_SHARE + _CUBES_SHARE:
        word, exponent = ("squared", 2) if pick < _SQUARES_SHARE else ("cubed", 3)
        a = rng.choice((rng.randint(2, 99), rng.randint(100, 999)))
        return Expression(f"{a} {word}", f"{a} ** {exponent}")
    a, b = rng.choice((rng.randint(2, 12), rng.randint(10, 999))), rng.randint(2, 10)
    return Expression(rng.choice(_POWERS).format(a=a, b=b), f"{a} ** {b}")


def _percentage(rng: random.Random) -> Expression:
    round_share = 5 * rng.randint(1, 19)
    p = rng.choice((str(round_share), str(rng.randint(1, 99)), f"{rng.randint(1, 19)}.5"))
    n = _decimal(rng) if rng.random() < 0.1 else _number(rng)
    return Expression(rng.choice(_PERCENTAGES).format(p=p, n=n), rounded(f"{p} / 100 * {n}"))
