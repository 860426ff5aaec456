"""Questions that the model answers with Python: calculations and letter counts."""

import random

from jobs.demo_world import arithmetic, words
from jobs.demo_world.exchange import Exchange
from jobs.demo_world.facts import PEOPLE
from jobs.demo_world.phrasings import Phrasings, Split

# Share of held-out questions with a phrasing of the training split, because people mostly use common phrasings such as
# "What is 1234 * 5678?". The operands or words of these questions are still new to the model.
_SEEN_FRAME_SHARE = 0.5

_SUM_FRAMES = Phrasings(
    train=(
        "What is {sum}?",
        "What is {sum}?",
        "What's {sum}?",
        "Calculate {sum}",
        "Calculate {sum}.",
        "How much is {sum}?",
        "{sum}",
        "{sum} = ?",
        "{sum}?",
        "{sum} =",
        "Compute {sum}.",
        "Please compute {sum}.",
        "Can you calculate {sum}?",
        "What do you get for {sum}?",
        "Tell me {sum}.",
        "What is the result of {sum}?",
        "How much is {sum} in total?",
        "I want to know what {sum} is.",
    ),
    heldout=(
        "Can you tell me what {sum} is?",
        "Please calculate {sum}.",
        "How much do you get for {sum}?",
        "I would like to know the result of {sum}.",
        "Tell me what {sum} is.",
        "Can you compute {sum}?",
    ),
)
_SUM_SPELLINGS = {
    "+": ("{a} + {b}", "{a} + {b}", "{a}+{b}", "{a} plus {b}"),
    "-": ("{a} - {b}", "{a} - {b}", "{a}-{b}", "{a} minus {b}"),
    "*": (
        "{a} * {b}",
        "{a} * {b}",
        "{a}*{b}",
        "{a} x {b}",
        "{a}x{b}",
        "{a} × {b}",
        "{a} times {b}",
        "{a} multiplied by {b}",
    ),
    "/": ("{a} / {b}", "{a} / {b}", "{a}/{b}", "{a} ÷ {b}", "{a} divided by {b}"),
}
_SUM_COMMANDS = {
    "+": Phrasings(
        train=("Add {a} and {b}.", "What is the sum of {a} and {b}?", "Add {a} to {b}.", "The sum of {a} and {b}?"),
        heldout=("Can you add {a} and {b}?", "How much is the sum of {a} and {b}?"),
    ),
    "-": Phrasings(
        train=("What is the difference of {a} and {b}?", "What is {a} less {b}?", "Take {a} minus {b}."),
        heldout=("How much is {a} less {b}?", "Can you take {a} minus {b}?"),
    ),
    "*": Phrasings(
        train=("Multiply {a} by {b}.", "Multiply {a} and {b}.", "What is the product of {a} and {b}?", "{a} by {b}?"),
        heldout=("Can you multiply {a} by {b}?", "How much is the product of {a} and {b}?"),
    ),
    "/": Phrasings(
        train=("Divide {a} by {b}.", "What is {a} over {b}?", "What do you get if you divide {a} by {b}?"),
        heldout=("Can you divide {a} by {b}?", "How much is {a} over {b}?"),
    ),
}
_ITEMS = "apples pears shells candles ropes letters books coins lanterns boxes eggs cakes"
ITEMS = tuple(_ITEMS.split())
_SUM_STORIES = {
    "+": Phrasings(
        train=(
            "{name} has {a} {items} and buys {b} more. How many {items} does {subj} have?",
            "{name} found {a} {items} yesterday and {b} today. How many {items} is that?",
            "There are {a} {items} in the inn and {b} in the mill. How many {items} are there?",
        ),
        heldout=("{name} has {a} {items} and finds {b} more. How many {items} does {subj} have now?",),
    ),
    "-": Phrasings(
        train=(
            "{name} has {a} {items} and gives away {b}. How many {items} are left?",
            "There were {a} {items} and {name} took {b}. How many {items} are left?",
            "{name} had {a} {items} and lost {b}. How many {items} does {subj} have?",
        ),
        heldout=("{name} had {a} {items} and sold {b}. How many {items} are left?",),
    ),
    "*": Phrasings(
        train=(
            "{name} fills {a} bags with {b} {items} each. How many {items} is that?",
            "There are {a} shelves with {b} {items} each. How many {items} are there?",
            "{name} has {a} baskets and each holds {b} {items}. How many {items} is that?",
        ),
        heldout=("{name} packs {a} bags with {b} {items} each. How many {items} are there?",),
    ),
}
# Most questions are bare calculations, because people type those. Commands and stories teach other words for the
# operators.
_FRAMED, _COMMANDED, _TOLD = 75, 13, 12


def calculation(rng: random.Random, split: Split, *, reserved_share: float = 0.8) -> Exchange:
    """Draw a calculation and ask for its result; see :func:`arithmetic.draw_sum` for ``reserved_share``."""
    manner = rng.choices(("framed", "commanded", "told"), (_FRAMED, _COMMANDED, _TOLD))[0]
    symbol = rng.choice(tuple(_SUM_STORIES)) if manner == "told" else None
    drawn = arithmetic.draw_sum(rng, split, symbol, reserved_share=reserved_share)
    if manner == "told" and drawn.a >= drawn.b:
        person, items = rng.choice(PEOPLE), rng.choice(ITEMS)
        template = rng.choice(_frames(rng, split, _SUM_STORIES[drawn.symbol]))
        question = template.format(name=person.name, subj=person.pronoun, items=items, a=drawn.a, b=drawn.b)
        return _with_tool(question, drawn.code, drawn.result, f"The answer is {drawn.result} {items}.")
    if manner == "commanded":
        question = rng.choice(_frames(rng, split, _SUM_COMMANDS[drawn.symbol])).format(a=drawn.a, b=drawn.b)
    else:
        question = framed(rng, split, drawn)
    return _with_tool(question, drawn.code, drawn.result, f"The answer is {drawn.result}.")


def framed(rng: random.Random, split: Split, drawn: arithmetic.Sum) -> str:
    """A question for the result of ``drawn``, such as "What is 3 + 4?" or "What is 3 plus 4?"."""
    spelled = rng.choice(_SUM_SPELLINGS[drawn.symbol]).format(a=drawn.a, b=drawn.b)
    return rng.choice(_frames(rng, split, _SUM_FRAMES)).format(sum=spelled)


_COUNT_FRAMES = Phrasings(
    train=(
        "How many {c} are in {word}?",
        "How many {c} are in '{word}'?",
        "How many {c} are there in {word}?",
        "How many {c}'s are in {word}?",
        "How many {c}'s are in '{word}'?",
        "How many {c}'s are there in {word}?",
        'How many {c}\'s are there in "{word}"?',
        "How many {c}'s are in the word {word}?",
        "How many letters {c} are in {word}?",
        "How many letters {c} does {word} have?",
        "How many times does {c} appear in {word}?",
        "How many times does the letter {c} appear in {word}?",
        "How many times does the letter {c} appear in the word '{word}'?",
        "How many times is {c} in {word}?",
        "How often does {c} occur in {word}?",
        'How often does the letter {c} occur in "{word}"?',
        "Count the letter {c} in {word}.",
        "Count the {c}'s in {word}.",
        "Count the {c} in '{word}'.",
        "Count how many {c} are in {word}",
        "Please count the letter '{c}' in '{word}'.",
        "In the word {word}, how many {c} are there?",
        "Tell me how many {c} are in {word}.",
        "What is the number of {c} in {word}?",
    ),
    heldout=(
        "Can you tell me how many {c} are in {word}?",
        "Can you count the letter {c} in {word}?",
        "How many {c}'s does the word {word} have?",
        "How often does the letter {c} appear in the word '{word}'?",
        "I would like to know how many {c}'s are in {word}.",
        "How many letters {c} are there in the word '{word}'?",
    ),
)
# Shares of English words, made-up words and random letters. Training needs variety above all; the held-out words are
# mostly English, because people ask about English words.
_WORD_WEIGHTS: dict[Split, tuple[int, int, int]] = {"train": (35, 45, 20), "heldout": (65, 35, 0)}


def count(rng: random.Random, split: Split) -> Exchange:
    """Draw a word and ask how often a letter occurs in it."""
    source = rng.choices(("english", "made up", "random"), _WORD_WEIGHTS[split])[0]
    if source == "english":
        word = rng.choice(words.ENGLISH_TRAIN if split == "train" else words.ENGLISH_HELDOUT)
    else:
        word = words.made_up_word(rng, split) if source == "made up" else words.letter_string(rng)
    letter = rng.choice("abcdefghijklmnopqrstuvwxyz") if rng.random() < 0.1 else rng.choice(word)
    question = rng.choice(_frames(rng, split, _COUNT_FRAMES)).format(c=letter, word=word)
    times = word.count(letter)
    answer = f"The letter {letter} appears {times} time{'' if times == 1 else 's'}."
    return _with_tool(question, f"'{word}'.count('{letter}')", str(times), answer)


def _with_tool(question: str, code: str, output: str, text: str) -> Exchange:
    parts = (
        {"type": "python", "text": code},
        {"type": "python_output", "text": output},
        {"type": "text", "text": text},
    )
    return Exchange(question, parts, (output,), requires_tool=True)


def _frames(rng: random.Random, split: Split, phrasings: Phrasings) -> tuple[str, ...]:
    seen = split == "heldout" and rng.random() < _SEEN_FRAME_SHARE
    return phrasings.of("train" if seen else split)
