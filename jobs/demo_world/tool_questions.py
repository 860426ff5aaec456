"""Questions that the model answers with Python: calculations and letter counts."""

import random

from jobs.demo_world import arithmetic, words
from jobs.demo_world.exchange import Exchange
from jobs.demo_world.facts import PEOPLE
from jobs.demo_world.tables import Phrasings, Split, Table, Words, read_content

# Share of held-out questions with a phrasing of the training split. It is high, because people mostly use common
# phrasings such as "What is 1234 * 5678?". The operands or words of these questions are still new to the model.
_SEEN_FRAME_SHARE = 0.5


class ToolQuestions(Table):
    """The content of ``content/tool_questions.toml``. The keys of the dictionaries are operators."""

    items: Words
    spelling: tuple[str, ...]
    sums: Phrasings
    spellings: dict[str, tuple[str, ...]]
    commands: dict[str, Phrasings]
    stories: dict[str, Phrasings]
    squares: Phrasings
    counts: Phrasings


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


# Weights of English words, made-up words and random letters. Training mainly needs variety. Held-out words are mostly
# English, because people ask about English words.
_WORD_WEIGHTS: dict[Split, tuple[int, int, int]] = {"train": (35, 45, 20), "heldout": (65, 35, 0)}


def count(rng: random.Random, split: Split) -> Exchange:
    """Draw a word and ask how often a letter occurs in it."""
    source = rng.choices(("english", "made up", "random"), _WORD_WEIGHTS[split])[0]
    if source == "english":
        word = rng.choice(words.ENGLISH.of(split))
    else:
        word = words.made_up_word(rng, split) if source == "made up" else words.letter_string(rng)
    letter = rng.choice("abcdefghijklmnopqrstuvwxyz") if rng.random() < 0.1 else rng.choice(word)
    question = draw_frame(rng, split, QUESTIONS.counts).format(c=letter, word=word)
    times = word.count(letter)
    answer = f"The letter {letter} appears {times} time{'' if times == 1 else 's'}."
    return _with_tool(question, f"'{word}'.count('{letter}')", str(times), answer)


def draw_frame(rng: random.Random, split: Split, phrasings: Phrasings) -> str:
    """Draw a phrasing. Half of the held-out questions use a phrasing of the training split."""
    seen = split == "heldout" and rng.random() < _SEEN_FRAME_SHARE
    return rng.choice(phrasings.of("train" if seen else split))


def _with_tool(question: str, code: str, output: str, text: str) -> Exchange:
    parts = (
        {"type": "python", "text": code},
        {"type": "python_output", "text": output},
        {"type": "text", "text": text},
    )
    return Exchange(question, parts, (output,), requires_tool=True)
