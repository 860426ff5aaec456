"""Questions that the model answers with Python: calculations, comparisons, word problems, letter counts, spellings."""

import dataclasses
import random

from jobs.demo_world import arithmetic, expressions, problems, words
from jobs.demo_world.exchange import Exchange
from jobs.demo_world.facts import PEOPLE
from jobs.demo_world.tables import Phrasings, Split, Table, Words, draw_frame, read_content


class ToolQuestions(Table):
    """The content of ``content/tool_questions.toml``. The keys of the dictionaries are operators."""

    items: Words
    spelling: Phrasings
    lengths: Phrasings
    sums: Phrasings
    spellings: dict[str, tuple[str, ...]]
    commands: dict[str, Phrasings]
    stories: dict[str, Phrasings]
    squares: Phrasings
    counts: Phrasings
    comparisons: dict[str, Phrasings]


QUESTIONS = read_content("tool_questions", ToolQuestions)

# Shares of the forms of questions, in percent. Most questions are bare calculations, because people mostly type those.
# Commands and stories teach other words for the operators.
_FRAMED, _COMMANDED, _TOLD = 75, 13, 12


def calculation(rng: random.Random, split: Split, *, reserved_share: float = 0.8) -> Exchange:
    """Draw a calculation and ask for its result; see :func:`arithmetic.draw_sum` for ``reserved_share``."""
    manner = rng.choices(("framed", "commanded", "told"), (_FRAMED, _COMMANDED, _TOLD))[0]
    symbol = rng.choice(tuple(QUESTIONS.stories)) if manner == "told" else None
    drawn = arithmetic.draw_sum(rng, split, symbol, reserved_share=reserved_share)
    if manner == "told" and drawn.a >= drawn.b:
        person, items = rng.choice(PEOPLE), rng.choice(QUESTIONS.items)
        template = draw_frame(rng, split, QUESTIONS.stories[drawn.symbol])
        question = template.format(name=person.name, subj=person.pronoun, items=items, a=drawn.a, b=drawn.b)
        return _with_tool(question, drawn.code, drawn.result, f"The answer is {drawn.result} {items}.")
    if manner == "commanded":
        question = draw_frame(rng, split, QUESTIONS.commands[drawn.symbol]).format(a=drawn.a, b=drawn.b)
    else:
        question = framed(rng, split, drawn)
    return _with_tool(question, drawn.code, drawn.result, f"The answer is {drawn.result}.")


def framed(rng: random.Random, split: Split, drawn: arithmetic.Sum) -> str:
    """A question for the result of ``drawn``, such as "What is 3 + 4?" or "What is 3 plus 4?"."""
    spelled = rng.choice(QUESTIONS.spellings[drawn.symbol]).format(a=drawn.a, b=drawn.b)
    return draw_frame(rng, split, QUESTIONS.sums).format(sum=spelled)


def expression(rng: random.Random, split: Split) -> Exchange:
    """Draw a calculation with three or four numbers, a power or a division by zero, and ask for its result."""
    return _ask_result(rng, split, expressions.draw_chain(rng, split))


def decimal(rng: random.Random, split: Split) -> Exchange:
    """Draw a calculation with decimals or a percentage, and ask for its result."""
    return _ask_result(rng, split, expressions.draw_decimal(rng, split))


def _ask_result(rng: random.Random, split: Split, drawn: expressions.Expression) -> Exchange:
    question = draw_frame(rng, split, QUESTIONS.sums).format(sum=drawn.spelled)
    if drawn.result == expressions.DIVISION_BY_ZERO:
        return dataclasses.replace(
            _with_tool(question, drawn.code, drawn.result, "No number can be divided by zero."),
            expected=("divided by zero",),
        )
    return _with_tool(question, drawn.code, drawn.result, f"The answer is {drawn.result}.")


# The functions that compare two numbers, and how an answer names their results.
_COMPARED = {"max": "larger", "min": "smaller"}


def comparison(rng: random.Random, split: Split) -> Exchange:
    """Draw two numbers, and ask which of them is larger or smaller."""
    function = rng.choice(tuple(_COMPARED))
    a, b, drawn = expressions.draw_comparison(rng, split, function)
    question = draw_frame(rng, split, QUESTIONS.comparisons[function]).format(a=a, b=b)
    return _with_tool(question, drawn.code, drawn.result, f"The {_COMPARED[function]} number is {drawn.result}.")


def word_problem(rng: random.Random, split: Split) -> Exchange:
    """Draw a word problem of one or two steps."""
    drawn = problems.problem(rng, split)
    return _with_tool(drawn.question, drawn.code, drawn.result, f"The answer is {drawn.result} {drawn.unit}.")


# Share of the spelling questions that ask for the number of all letters.
_LENGTH_SHARE = 0.3
# Weights of English words, made-up words and random letters. Training mainly needs variety. Held-out words are mostly
# English, because people ask about English words.
_WORD_WEIGHTS: dict[Split, tuple[int, int, int]] = {"train": (35, 45, 20), "heldout": (65, 35, 0)}


def _draw_word(rng: random.Random, split: Split) -> str:
    source = rng.choices(("english", "made up", "random"), _WORD_WEIGHTS[split])[0]
    if source == "english":
        return rng.choice(words.ENGLISH.of(split))
    return words.made_up_word(rng, split) if source == "made up" else words.letter_string(rng)


def count(rng: random.Random, split: Split) -> Exchange:
    """Draw a word and ask how often a letter occurs in it."""
    word = _draw_word(rng, split)
    letter = rng.choice("abcdefghijklmnopqrstuvwxyz") if rng.random() < 0.1 else rng.choice(word)
    question = draw_frame(rng, split, QUESTIONS.counts).format(c=letter, word=word)
    times = word.count(letter)
    answer = f"The letter {letter} appears {times} time{'' if times == 1 else 's'}."
    return _with_tool(question, f"'{word}'.count('{letter}')", str(times), answer)


def spelling(rng: random.Random, split: Split) -> Exchange:
    """Draw a word and ask for its letters, or for their number."""
    word = _draw_word(rng, split)
    if rng.random() < _LENGTH_SHARE:
        question = draw_frame(rng, split, QUESTIONS.lengths).format(word=word)
        return _with_tool(question, f"len('{word}')", str(len(word)), f"The word has {len(word)} letters.")
    question = draw_frame(rng, split, QUESTIONS.spelling).format(word=word)
    letters = " ".join(word)
    answer = f"It is spelled {letters}."
    # The words around the letters are expected too, so that no further letter can come before or after them.
    return dataclasses.replace(_with_tool(question, f"' '.join('{word}')", letters, answer), expected=(answer,))


def _with_tool(question: str, code: str, output: str, text: str) -> Exchange:
    parts = (
        {"type": "python", "text": code},
        {"type": "python_output", "text": output},
        {"type": "text", "text": text},
    )
    return Exchange(question, parts, (output,), requires_tool=True)
