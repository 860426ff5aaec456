"""Word problems of one and two steps, which the model solves with one Python expression.

Some problems are put together from sentences: what somebody has, what is added or taken away, and a question. The other
problems, called everyday problems, are whole texts. The numbers of both are divided between the splits in the same way
as the numbers of other calculations (:mod:`expressions`).
"""

import dataclasses
import random

from jobs.demo_world.expressions import RESERVED_SHARE, belongs, draw_number, python_output
from jobs.demo_world.facts import PEOPLE, names
from jobs.demo_world.phrasings import OBJECT
from jobs.demo_world.tables import Phrasings, Split, Table, Words, draw_frame, draw_phrasings, read_content
from jobs.demo_world.words import STRANGERS


class EverydayProblem(Phrasings):
    """Wordings of a whole problem, with the Python code that solves it.

    The numbers are drawn up to ``largest``. A number that the code divides is larger: it is a product of two of them.
    """

    code: str
    largest: int


class ProblemSentences(Table):
    """The content of ``content/problems.toml``, explained there."""

    items: Words
    things: Words
    start: Phrasings
    gain: Phrasings
    loss: Phrasings
    groups: Phrasings
    total: Phrasings
    left: Phrasings
    share: Phrasings
    price: Phrasings
    change: Phrasings
    everyday: tuple[EverydayProblem, ...]


_SENTENCES = read_content("problems", ProblemSentences)

# The sentences of each sort of problem, and its weight.
_SORTS: dict[tuple[str, ...], int] = {
    ("start", "gain", "total"): 2,
    ("start", "loss", "left"): 2,
    ("groups", "total"): 2,
    ("start", "share"): 2,
    ("price",): 2,
    ("start", "gain", "gain", "total"): 2,
    ("start", "gain", "loss", "left"): 3,
    ("start", "loss", "gain", "total"): 3,
    ("start", "loss", "loss", "left"): 2,
    ("groups", "gain", "total"): 3,
    ("groups", "loss", "left"): 3,
    ("start", "gain", "share"): 3,
    ("change",): 3,
}
# Share of everyday problems, which may be about anybody. The other problems are about people of Saltmere.
_EVERYDAY_SHARE = 0.45
_SMALLEST, _LARGEST, _MOST_SHARES = 2, 999, 12


@dataclasses.dataclass(frozen=True)
class Problem:
    """A word problem. ``unit`` names the things that the result counts, such as ``coins``, or is empty."""

    question: str
    code: str
    result: str
    unit: str


def problem(rng: random.Random, split: Split) -> Problem:
    """Draw a word problem that the other split never contains."""
    if rng.random() < _EVERYDAY_SHARE:
        return _everyday(rng, split)
    sort = rng.choices(tuple(_SORTS), tuple(_SORTS.values()))[0]
    reserved = rng.random() < RESERVED_SHARE
    while True:
        numbers, code, value = _calculation(rng, sort)
        if value >= 1 and belongs(code, str(value), split, reserved=reserved):
            break
    person, friend = rng.sample(PEOPLE, 2)
    items = rng.choice(_SENTENCES.items)
    said = []
    remaining = iter(numbers)
    for name in sort:
        template = draw_frame(rng, split, getattr(_SENTENCES, name))
        # A sentence with two or three numbers names them {n}, {m} and {k}.
        fields = {letter: next(remaining) for letter in "nmk" if f"{{{letter}}}" in template}
        said.append(
            template.format(
                **fields,
                name=person.name,
                subj=person.pronoun,
                Subj=person.pronoun.capitalize(),
                obj=OBJECT[person.pronoun],
                friend=friend.name,
                home=friend.home,
                items=items,
            )
        )
    unit = "coins" if sort in (("price",), ("change",)) else items
    return Problem(" ".join(said), code, str(value), unit)


def _everyday(rng: random.Random, split: Split) -> Problem:
    drawn = draw_phrasings(rng, _SENTENCES.everyday)
    reserved = rng.random() < RESERVED_SHARE
    while True:
        numbers = {letter: _number(rng, drawn.largest) for letter in "nmk"}
        if "//" in drawn.code:
            numbers["n"] *= numbers["m"]  # The division has no remainder.
        code = drawn.code.format(**numbers)
        result = python_output(code)
        if int(result) >= 1 and belongs(code, result, split, reserved=reserved):
            break
    person, other = rng.sample((*STRANGERS.of(split), *names(PEOPLE)), 2)
    fields = {"person": person, "other": other, "thing": rng.choice(_SENTENCES.things)}
    return Problem(draw_frame(rng, split, drawn).format(**numbers, **fields), code, result, "")


def _calculation(rng: random.Random, sort: tuple[str, ...]) -> tuple[list[int], str, int]:
    """Draw the numbers of a problem in the order of its sentences, and return them with the code and its value."""
    if sort == ("change",):
        price, bought = _number(rng, 99), _number(rng, 99)
        paid = price * bought + _number(rng, 99)
        return [bought, price, paid], f"{paid} - {bought} * {price}", paid - bought * price
    if sort[0] in ("groups", "price"):
        numbers = [_number(rng, 99), _number(rng, _LARGEST)]
        code, value = f"{numbers[0]} * {numbers[1]}", numbers[0] * numbers[1]
    else:
        numbers = [_number(rng, _LARGEST)]
        code, value = str(numbers[0]), numbers[0]
    for step in sort[1:]:
        if step == "share":
            # The last number drawn so far is raised until the value can be divided without a remainder.
            among = rng.randint(2, _MOST_SHARES)
            numbers[-1] += -value % among
            value += -value % among
            code = f"({' + '.join(map(str, numbers))}) // {among}" if len(numbers) > 1 else f"{numbers[0]} // {among}"
            numbers.append(among)
            value //= among
        elif step in ("gain", "loss"):
            drawn = _number(rng, _LARGEST if step == "gain" else max(_SMALLEST, min(_LARGEST, value - 1)))
            numbers.append(drawn)
            code += f" {'+' if step == 'gain' else '-'} {drawn}"
            value += drawn if step == "gain" else -drawn
    return numbers, code, value


def _number(rng: random.Random, largest: int) -> int:
    while True:
        drawn = draw_number(rng)
        if _SMALLEST <= drawn <= largest:
            return drawn
