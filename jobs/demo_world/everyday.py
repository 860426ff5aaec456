"""Calculations in everyday words: prices, roots, remainders, averages, units, times of day, ages, number words, steps.

The numbers are divided between the splits in the same way as those of other calculations (:mod:`expressions`).
"""

import itertools
import random
from collections.abc import Callable

from pydantic import Field

from jobs.demo_world.arithmetic import LARGEST, contains_reserved_number, rounded
from jobs.demo_world.expressions import DIVISION_BY_ZERO, Expression, belongs, draw_number
from jobs.demo_world.facts import PEOPLE, names
from jobs.demo_world.tables import Phrasings, Split, Table, Words, draw_frame, read_content
from jobs.demo_world.words import STRANGERS


class Form(Phrasings):
    """Questions with the same Python code.

    Attributes:
        code: Python code in which ``{a}``, ``{b}`` and ``{c}`` are the numbers of the question.
        rounded: whether the result is always rounded; otherwise it is only rounded if a number is a decimal.
        exact: whether the result is not rounded even if a number is a decimal.
        numbers: the sort of number (:data:`_SORTS`) for a letter; a letter that is not named here is a whole number.
        positive: whether results below 1 make no sense.
        largest: upper limit of a whole number.
        longest: upper limit of the number of characters of a result.
        worded: whether the questions have numbers in words.
        weight: how often the form is drawn, relative to the other forms.
    """

    code: str
    rounded: bool = False
    exact: bool = False
    numbers: dict[str, str] = Field(default_factory=dict)
    positive: bool = False
    largest: int = LARGEST
    longest: int = 10
    worded: bool = False
    weight: float = 1.0


class Unit(Table):
    """A small and a large unit, such as minute and hour. The large unit is ``factor`` small units.

    ``small`` and ``large`` are lists of names. A question uses one index for both lists.
    """

    small: tuple[str, ...]
    large: tuple[str, ...]
    factor: str


class Steps(Table):
    """Calculations that are told step by step.

    Each key of ``steps`` is the Python code of a step, in which ``{b}`` is a number. Its values are ways to say the
    step. ``joints`` are texts between two steps, such as a comma.
    """

    starts: Phrasings
    steps: dict[str, tuple[str, ...]]
    joints: tuple[str, ...]


class Everyday(Table):
    """The content of ``content/everyday.toml``, explained there."""

    goods: Words
    forms: tuple[Form, ...]
    units: tuple[Unit, ...]
    to_small: Phrasings
    to_large: Phrasings
    told: Steps


_CONTENT = read_content("everyday", Everyday)
_FORMS = _CONTENT.forms

# Shares of conversions between units, and of calculations told step by step, among everyday questions.
_UNITS_SHARE, _TOLD_SHARE = 0.08, 0.06
# After this many attempts to draw a calculation with a reserved number, a held-out calculation without one is drawn.
_TRIES = 200
# Numbers that people write as words.
_WORDED = range(2, 100)
# Share of held-out calculations with a reserved number. Forms with numbers in words have no reserved numbers.
_RESERVED_SHARE = 0.6
_SMALLEST = 2
_LONGEST_RESULT = 10
# How people write amounts of money. A question uses one of these.
_CURRENCIES = ("{}", "{}", "${}", "${}", "€{}", "£{}", "{} euros", "{} euro", "{} dollars", "{}€", "{} $", "{} coins")
_LARGE_WORDS = (("thousand", 1000), ("million", 1_000_000), ("billion", 1_000_000_000), ("hundred", 100))

_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def draw_everyday(rng: random.Random, split: Split) -> Expression:
    """Draw a question that the other split never contains, with the code that answers it."""
    sort = rng.random()
    if sort < _TOLD_SHARE:
        return _told(rng, split)
    if sort < _TOLD_SHARE + _UNITS_SHARE:
        return _conversion(rng, split)
    form = rng.choices(_FORMS, [form.weight for form in _FORMS])[0]
    # Numbers in words are not reserved: training could not teach which number the word of a reserved number means.
    reserved = not form.worded and rng.random() < _RESERVED_SHARE
    for tries in itertools.count():
        numbers = {letter: _drawn_number(rng, form, letter) for letter in "abc"}
        code = form.code.format(**{letter: written for letter, (_, written) in numbers.items()})
        decimal = any("." in numbers[letter][1] for letter in "abc" if f"{{{letter}}}" in form.code)
        drawn = Expression("", rounded(code) if form.rounded or (decimal and not form.exact) else code)
        said = " ".join(said for said, _ in numbers.values())
        # The question is checked apart from the code, because "31 million" in the question is 31000000 in the code.
        if split == "train" and contains_reserved_number(said):
            continue
        # Some forms can never draw a reserved number, so the search for one stops after _TRIES attempts.
        if _fits(drawn, split, form.longest, reserved=reserved and tries < _TRIES, positive=form.positive):
            break
    template = draw_frame(rng, split, form)
    currency = rng.choice(_CURRENCIES)
    person, other = rng.sample((*STRANGERS.of(split), *names(PEOPLE)), 2)
    fields = {"person": person, "other": other}
    for letter, (said, _) in numbers.items():
        words = _in_words(rng, int(said)) if said.isdigit() else said
        fields |= {letter: said, letter.upper(): words, f"{letter}_paid": currency.format(said)}
    goods = rng.choice(_CONTENT.goods)
    question = template.format(**fields, goods=goods)
    return Expression(question, drawn.code)


def _fits(drawn: Expression, split: Split, longest: int, *, reserved: bool, positive: bool = False) -> bool:
    result = drawn.result
    short = (len(result) <= longest and "e+" not in result) or result == DIVISION_BY_ZERO
    return short and not (positive and result[0] in "-0") and belongs(drawn.code, result, split, reserved=reserved)


def _conversion(rng: random.Random, split: Split) -> Expression:
    """Draw a question that converts a number of one unit to another unit."""
    unit = rng.choice(_CONTENT.units)
    reserved = rng.random() < _RESERVED_SHARE
    symbol, phrasings = rng.choice((("*", _CONTENT.to_small), ("/", _CONTENT.to_large)))
    while True:
        number = rng.choice((_whole, _whole, _whole, _decimal))(rng)
        code = f"{number} {symbol} {unit.factor}"
        drawn = Expression("", rounded(code) if symbol == "/" or "." in code else code)
        if _fits(drawn, split, _LONGEST_RESULT, reserved=reserved):
            break
    form = rng.randrange(len(unit.small))
    question = draw_frame(rng, split, phrasings).format(a=number, small=unit.small[form], large=unit.large[form])
    return Expression(question, drawn.code)


def _told(rng: random.Random, split: Split) -> Expression:
    """Draw a calculation that is told step by step, such as "take 8, double it, add 5"."""
    told = _CONTENT.told
    reserved = rng.random() < _RESERVED_SHARE
    while True:
        steps = rng.choices(tuple(told.steps), k=rng.choice((2, 2, 3)))
        numbers = [_whole(rng, 999) for _ in range(len(steps) + 1)]
        code = numbers[0]
        for step, number in zip(steps, numbers[1:], strict=True):
            # The steps so far get parentheses, because Python multiplies and divides before it adds and subtracts.
            added = step[0] in "*/" and any(sign in code.rpartition(")")[2] for sign in "+-")
            code = f"{f'({code})' if added else code} {step.format(b=number)}"
        drawn = Expression("", rounded(code) if "/" in code else code)
        if _fits(drawn, split, _LONGEST_RESULT, reserved=reserved):
            break
    said = [rng.choice(told.steps[step]).format(b=number) for step, number in zip(steps, numbers[1:], strict=True)]
    joint = rng.choice(told.joints)
    return Expression(draw_frame(rng, split, told.starts).format(a=numbers[0], steps=joint.join(said)), drawn.code)


def _drawn_number(rng: random.Random, form: Form, letter: str) -> tuple[str, str]:
    """Draw a number, and return it as the question says it and as the code writes it."""
    if form.worded and letter not in form.numbers:
        drawn = str(rng.choice(_WORDED))
    elif letter not in form.numbers:
        drawn = _whole(rng, form.largest)
    else:
        number = _SORTS[form.numbers[letter]](rng)
        if isinstance(number, tuple):
            return number
        drawn = number
    return drawn, drawn


def _in_words(rng: random.Random, n: int) -> str:
    words = number_words(n)
    return words.replace("-", " ") if rng.random() < 0.5 else words


def number_words(n: int) -> str:
    """A whole number below 100 in words, such as "twenty-five". Larger numbers stay in digits, as people write them."""
    if n >= 100:
        return str(n)
    if n < len(_ONES):
        return _ONES[n]
    tens, ones = divmod(n, 10)
    return f"{_TENS[tens]}-{_ONES[ones]}" if ones else _TENS[tens]


def _whole(rng: random.Random, largest: int = LARGEST) -> str:
    while True:
        drawn = draw_number(rng)
        if _SMALLEST <= drawn <= largest:
            return str(drawn)


def _few(rng: random.Random) -> str:
    return str(rng.randint(2, 12))


def _price(rng: random.Random) -> str:
    whole = _whole(rng, 2999)
    return whole if rng.random() < 0.5 else f"{whole}.{rng.choice(('50', '99', '20', f'{rng.randrange(100):02}'))}"


def _percent(rng: random.Random) -> str:
    return rng.choice((str(5 * rng.randint(1, 18)), str(rng.randint(1, 99)), f"{rng.randint(1, 19)}.5"))


def _decimal(rng: random.Random) -> str:
    tenths = rng.choice(("", "", *"0123456789"))
    return f"{rng.choice((rng.randrange(10), rng.randrange(100)))}.{tenths}{rng.choice('123456789')}"


def _long_decimal(rng: random.Random) -> str:
    return f"{_whole(rng, 999)}.{''.join(rng.choice('123456789') for _ in range(rng.randint(3, 5)))}"


def _signed(rng: random.Random) -> str:
    number = rng.choice((_whole, _whole, _decimal))(rng)
    return f"-{number}" if rng.random() < 0.25 else number


def _square(rng: random.Random) -> str:
    return str(rng.randint(2, 40) ** 2) if rng.random() < 0.7 else _whole(rng)


def _cube(rng: random.Random) -> str:
    return str(rng.randint(2, 21) ** 3) if rng.random() < 0.7 else _whole(rng)


def _large(rng: random.Random) -> tuple[str, str]:
    """A number such as "5 million", "5k" or "5,000"."""
    sort = rng.random()
    if sort < 0.2:
        n = rng.randint(1, 999)
        return f"{n}k", f"{n}000"
    if sort < 0.45:
        n = rng.choice((1000 * rng.randint(1, 999), rng.randint(1000, 999_999)))
        return f"{n:,}", str(n)
    word, value = rng.choice(_LARGE_WORDS)
    n = rng.choice((rng.randint(1, 20), rng.randint(1, 999) if value >= 1000 else rng.randint(1, 20)))
    return f"{n if n >= 20 or rng.random() < 0.5 else number_words(n)} {word}", str(n * value)


def _clock(earliest: int, latest: int) -> Callable[[random.Random], tuple[str, str]]:
    """Return a function that draws a time of day such as "9:30", whose hour is from ``earliest`` to ``latest``.

    The code of a time computes its minutes since midnight.
    """

    def draw(rng: random.Random) -> tuple[str, str]:
        hour, minute = rng.randint(earliest, latest), rng.choice((0, 30, 15, 45, rng.randrange(60), rng.randrange(60)))
        return f"{hour}:{minute:02}", f"{hour} * 60 + {minute}"

    return draw


# For each sort of number, the function that draws it. The function returns a text, or two texts if the question says
# the number in another way than the code writes it.
_SORTS: dict[str, Callable[[random.Random], str | tuple[str, str]]] = {
    "few": _few,
    "price": _price,
    "percent": _percent,
    "decimal": _decimal,
    "long_decimal": _long_decimal,
    "signed": _signed,
    "square": _square,
    "cube": _cube,
    "large": _large,
    "age": lambda rng: str(rng.randint(2, 99)),
    "born": lambda rng: str(rng.randint(1920, 2015)),
    "year": lambda rng: str(rng.randint(2016, 2060)),
    "factorial": lambda rng: str(rng.randint(2, 20)),
    "early": _clock(0, 22),
    "late": _clock(1, 23),
}
