"""Generated practice with letters: spelling a word, and counting a letter in it with Python."""

from __future__ import annotations

import random

from jobs.demo_world import tool_questions, words
from jobs.demo_world.exchange import Exchange
from jobs.demo_world.phrasings import Split
from jobs.demo_world.seeding import generator
from jobs.tasks.conversions import Messages

# The share of English words among those to spell; the others are made up, so that no list of words is learned by heart.
_ENGLISH_SHARE = 0.5
_REQUESTS = (
    "Spell the word {word}.",
    "Spell the word: {word}",
    "Spell {word}.",
    "How do you spell {word}?",
    "How is the word '{word}' spelled?",
    "How do I spell {word}?",
    "Please spell {word} for me.",
    "Can you spell '{word}'?",
    "What are the letters of {word}?",
    "Which letters does the word {word} have?",
    'Write "{word}" letter by letter.',
    "Tell me the letters of the word {word}.",
)


def spelling(number: int) -> Messages:
    """The ``number``-th request to spell a word, and the letters."""
    return spelling_exchange(number, "train").messages


def counting(number: int) -> Messages:
    """The ``number``-th question how often a letter occurs in a word, answered with the Python tool."""
    return counting_exchange(number, "train").messages


def spelling_exchange(number: int, split: Split) -> Exchange:
    """As :func:`spelling`; the words of one split never occur in the other. What is expected is the word."""
    rng = _generator("spelling", number, split)
    english = rng.random() < _ENGLISH_SHARE
    known = words.ENGLISH_TRAIN if split == "train" else words.ENGLISH_HELDOUT
    word = rng.choice(known) if english else words.made_up_word(rng, split)
    question = rng.choice(_REQUESTS).format(word=word)
    return Exchange(question, f"{word} is spelled {' '.join(word)}.", (word,))


def counting_exchange(number: int, split: Split) -> Exchange:
    """As :func:`counting`; the words of one split never occur in the other."""
    return tool_questions.count(_generator("counting", number, split), split)


def _generator(task: str, number: int, split: Split) -> random.Random:
    return generator(f"tasks/{task}" if split == "train" else f"tasks/{task}/{split}", number)
