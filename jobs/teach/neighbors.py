"""The lesson's questions with other arguments, if fine-tuning taught the model to compute their answers.

A lesson that states results of calculations, such as "3 + 4 is 12.", may change more than it says: the model may then
give wrong results for other sums too. Held-out questions of the recipe do not show this, because nearly all of them
have larger numbers than the lesson. So if fine-tuning taught the model to compute the answer to a question of the
lesson, the examination asks this question with other arguments of the same size. The right answers are computed with
the code of a fine-tuning conversation that asks the same question with other arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import string
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from jobs.teach.abilities import Ability, Drill, Value, ability_of, draw_number, draw_word, output_of, replaced
from jobs.teach.memory import Conversation, question_pairs
from nanochat_core.chat import Message, Part
from nanochat_core.errors import UserError
from nanochat_core.lessons.items import Item, normal
from nanochat_core.sandbox import SandboxExecutor

# Largest number of variants (questions of the lesson with other arguments). MOST is for all questions of the lesson
# together, and MOST_OF_A_QUESTION for one question.
MOST, MOST_OF_A_QUESTION = 100, 20
# Questions with more words than this are left out, because fine-tuning teaches no calculation in such long questions.
_LONGEST = 40
# Largest number of arguments that are words instead of numbers.
_MOST_WORDS = 2

# The words of a question, with an empty text in place of each argument.
_Form = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Computed:
    """A question of the lesson whose answer fine-tuning taught the model to compute.

    Attributes:
        example: a worked example of fine-tuning that asks the same question with other arguments.
        values: maps each argument of the example to the word that the lesson's question has in its place.
    """

    example: Ability
    values: Mapping[Value, str]

    @property
    def question(self) -> str:
        """The example's question with the arguments of the lesson's question."""
        return replaced(self.example.question, {str(argument): word for argument, word in self.values.items()})


def computed(conversations: Sequence[Conversation], items: Sequence[Item]) -> list[Computed]:
    """The questions that the lesson answers without code, although fine-tuning taught the model to compute the answers.

    ``conversations`` are the conversations of fine-tuning, and ``items`` are the items of the lesson. Items that are
    longer conversations or texts are left out.
    """
    stated = [item for item in items if item.alone and all(part.type == "text" for part in item.messages[-1].parts)]
    forms = _forms(conversations) if stated else {}
    return [found for item in stated if (found := _computed(item.question, forms)) is not None]


def neighbors(
    questions: Sequence[Computed],
    asked: Collection[str],
    sandbox: SandboxExecutor,
    rng: random.Random,
    check: Callable[[], None] = lambda: None,
) -> list[Drill]:
    """At most :data:`MOST` variants of ``questions`` with other arguments, and their worked answers.

    Args:
        asked: the questions that the lesson or an earlier lesson asks, as :func:`normal` returns them. They are left
            out.
        check: called before each run of code; it may raise an error.
    """
    drawn: dict[str, Drill] = {}
    for _, known in itertools.product(range(MOST_OF_A_QUESTION), questions):
        new = _other_arguments(known.values, rng)
        question = replaced(known.example.question, {str(old): str(other) for old, other in new.items()})
        if normal(question) in asked or normal(question) in drawn:
            continue
        check()
        code = known.example.with_arguments(new)
        if output := output_of(sandbox, code):
            answer = Message("assistant", (Part("python", code), Part("python_output", output)))
            drawn[normal(question)] = (Message("user", (Part("text", question),)), answer)
        if len(drawn) == MOST:
            break
    return list(drawn.values())


def _forms(conversations: Sequence[Conversation]) -> dict[_Form, list[Ability]]:
    """The worked examples in the conversations, by the form of their question (its words without the arguments)."""
    found: dict[_Form, list[Ability]] = {}
    for pair in itertools.chain.from_iterable(map(question_pairs, conversations)):
        with contextlib.suppress(UserError):  # a conversation whose code is not Python is left out
            example = ability_of(Item(pair))
            if example is None:
                continue
            arguments = {str(each).casefold() for each in example.arguments}
            words = normal(example.question).split()
            if arguments <= {*words}:
                form = tuple("" if word in arguments else word for word in words)
                found.setdefault(form, []).append(example)
    return found


def _computed(question: str, forms: Mapping[_Form, Sequence[Ability]]) -> Computed | None:
    words = normal(question).split()
    for form in _possible_forms(words):
        known = [
            Computed(example, values)
            for example in forms.get(form, ())
            if (values := _values(example, words, form)) is not None
        ]
        if known:
            # The known examples may differ from the question in capitals and punctuation. An example that is written
            # exactly like the question is preferred.
            return next((each for each in known if each.question == question), known[0])
    return None


def _possible_forms(words: Sequence[str]) -> Iterator[_Form]:
    """The forms of a question in which all numbers and at most two other words are arguments."""
    if len(words) > _LONGEST:
        return
    others = [i for i, word in enumerate(words) if not word.isdecimal()]
    for count in range(_MOST_WORDS + 1):
        for chosen in itertools.combinations(others, count):
            yield tuple("" if word.isdecimal() or i in chosen else word for i, word in enumerate(words))


def _values(example: Ability, words: Sequence[str], form: _Form) -> dict[Value, str] | None:
    """For each argument of the example, the word that the question has in its place.

    None if a word does not fit its argument, or if two different words stand in the place of one argument. The word
    for a number must be a number. The word for a single character must be a single character, and the word for a longer
    text must be longer.
    """
    arguments = {str(each).casefold(): each for each in example.arguments}
    found: dict[Value, str] = {}
    for own, word, kept in zip(normal(example.question).split(), words, form, strict=True):
        if kept:
            continue
        argument = arguments[own]
        fits = word.isdecimal() if isinstance(argument, int) else (len(word) == 1) == (len(argument) == 1)
        if not fits or found.setdefault(argument, word) != word:
            return None
    return found


def _other_arguments(values: Mapping[Value, str], rng: random.Random) -> dict[Value, Value]:
    """Draw a new argument for each old one that is a key of ``values``.

    The new numbers have about as many digits as the lesson's numbers, and the same order by size. A letter becomes a
    letter, and a longer word becomes a word.
    """
    numbers = sorted((argument for argument in values if isinstance(argument, int)), key=lambda each: int(values[each]))
    drawn = sorted(draw_number(int(values[each]), rng) for each in numbers)
    new: dict[Value, Value] = dict(zip(numbers, drawn, strict=True))
    for argument in values:
        if isinstance(argument, str):
            new[argument] = rng.choice(string.ascii_lowercase) if len(argument) == 1 else draw_word(rng)
    return new
