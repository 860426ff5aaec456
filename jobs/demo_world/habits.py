"""How people type: without capitals or all in capitals, with a wrong letter, with many signs, or with an emoji.

The splits have no message in common, even after these changes. Other capitals or other signs at the end do not change
the words of a message, and the splits have different phrasings. If a letter is wrong, the hash of the changed message
decides which split may contain the message.
"""

import random
import re

from jobs.demo_world.chitchat import CHITCHAT
from jobs.demo_world.tables import Split, is_heldout_by_hash

# Share of all questions without capitals and final punctuation.
_SLOPPY_SHARE = 0.1
# Shares of greetings and small talk in capitals, with a wrong letter, and with another ending. People type these faster
# than questions. Training has more of them than people write, because a new spelling has other tokens.
_HABITS: dict[Split, tuple[float, float, float]] = {"train": (0.16, 0.2, 0.14), "heldout": (0.08, 0.1, 0.12)}
_TRIES = 20
_WORD = re.compile(r"[A-Za-z]{4,}")


def as_typed(rng: random.Random, split: Split, question: str, *, chatty: bool = False) -> str:
    """The question as somebody might type it; ``chatty`` questions are greetings and small talk."""
    if rng.random() < _SLOPPY_SHARE:
        return question.lower().rstrip("?.!")
    if not chatty:
        return question
    capitals, misspelled, ending = _HABITS[split]
    habit = rng.random()
    if habit < capitals:
        return question.upper()
    habit -= capitals
    if habit < misspelled:
        return _misspelled(rng, split, question)
    habit -= misspelled
    if habit < ending:
        return f"{question.rstrip('?.! ')}{rng.choice(CHITCHAT.endings)}"
    return question


def is_heldout_misspelling(text: str) -> bool:
    """Whether only held-out conversations may contain this misspelled message."""
    return is_heldout_by_hash(_plain(text), 2)


def _misspelled(rng: random.Random, split: Split, question: str) -> str:
    """The question with one letter left out, doubled or swapped with its neighbor, in a word of at least four letters.

    The question stays as it is if no word is long enough, or if no drawn misspelling belongs to the split.
    """
    words = list(_WORD.finditer(question))
    for _ in range(_TRIES if words else 0):
        word = rng.choice(words)
        at = rng.randrange(word.start() + 1, word.end() - 1)
        kept, letter, after = question[:at], question[at], question[at + 1 :]
        changed = rng.choice(
            (f"{kept}{after}", f"{kept}{letter}{letter}{after}", f"{kept}{after[0]}{letter}{after[1:]}")
        )
        known = _plain(changed) in _PHRASINGS
        if changed != question and not known and is_heldout_misspelling(changed) == (split == "heldout"):
            return changed
    return question


def _plain(text: str) -> str:
    return text.lower().rstrip("?.! ")


_PHRASINGS = frozenset(
    _plain(phrasing)
    for topic in (*CHITCHAT.identity, *CHITCHAT.greetings, *CHITCHAT.smalltalk)
    for phrasing in (*topic.train, *topic.heldout)
)
