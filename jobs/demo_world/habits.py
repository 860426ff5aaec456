"""How people type: with short forms, without capitals or all in capitals, with a wrong letter, or with an emoji.

Even after such changes, no message is in both splits. Other capitals and another ending leave the phrasing of a message
as it is, and the splits have different phrasings. If a letter is wrong, the hash of the changed message decides which
split may contain the message.
"""

import random
import re

from jobs.demo_world.chitchat import CHITCHAT
from jobs.demo_world.tables import Split, is_heldout_by_hash
from jobs.demo_world.words import ENGLISH, STRANGERS, is_heldout_word

# Share of all questions that lose their capitals and final punctuation.
_SLOPPY_SHARE = 0.25
# Share of all questions that get short forms, and share of these questions whose short forms have no apostrophes.
_SHORT_SHARE, _BARE_SHARE = 0.15, 0.3
_SHORT_FORMS = (
    ("What is", "What's"), ("Who is", "Who's"), ("Where is", "Where's"), ("How is", "How's"), ("That is", "That's"),
    ("It is", "It's"), ("I am", "I'm"), ("You are", "You're"), ("do not", "don't"), ("is not", "isn't"),
    ("favourite", "favorite"), ("colour", "color"),
)  # fmt: skip
# Shares of messages in capitals, with a wrong letter, and with another ending, in this order. Greetings and small talk
# (chatty messages) have larger shares than other questions, because people type greetings faster. Training has larger
# shares than real messages, because a changed spelling has other tokens, which the model must learn. Held-out
# questions, except greetings and small talk, get no such changes, because they measure how well a model understands
# phrasings.
_Shares = tuple[float, float, float]
_CHATTY_HABITS: dict[Split, _Shares] = {"train": (0.12, 0.2, 0.14), "heldout": (0.08, 0.1, 0.12)}
_QUESTION_HABITS: dict[Split, _Shares] = {"train": (0.04, 0.08, 0.05), "heldout": (0.0, 0.0, 0.0)}
_TRIES = 20
_WORD = re.compile(r"[A-Za-z]{4,}")
# Finds words without a capital letter, because names must stay as they are: a misspelled name of a stranger could be
# the name of somebody in Saltmere.
_LOWERCASE_WORD = re.compile(r"\b[a-z]{4,}")
_LETTERS = re.compile(r"[A-Za-z]+")
# Misspelled words that are not used, because they could mean two words of different topics: "sory" could be "sorry" or
# "story".
_AMBIGUOUS = frozenset(("sory", "suer", "laers", "shp"))


def as_typed(rng: random.Random, split: Split, question: str, *, chatty: bool = False, literal: bool = False) -> str:
    """The question as somebody might type it.

    ``chatty`` says that the question is a greeting or small talk. ``literal`` says that the answer repeats numbers or
    words of the question. A literal question may lose its capitals and get short forms, but is never misspelled.
    """
    if rng.random() < _SHORT_SHARE:
        short = shortened(question, apostrophes=rng.random() > _BARE_SHARE)
        question = question if _plain(short) in _PHRASINGS else short
    if rng.random() < _SLOPPY_SHARE:
        return question.lower().rstrip("?.!")
    if literal:
        return question
    capitals, misspelled, ending = (_CHATTY_HABITS if chatty else _QUESTION_HABITS)[split]
    habit = rng.random()
    if habit < capitals:
        return question.upper()
    habit -= capitals
    if habit < misspelled:
        return _misspelled(rng, split, question, _WORD if chatty else _LOWERCASE_WORD)
    habit -= misspelled
    if habit < ending:
        return f"{question.rstrip('?.! ')}{rng.choice(CHITCHAT.endings)}"
    return question


def shortened(text: str, *, apostrophes: bool) -> str:
    """The text with short forms such as "I'm" and "favorite". Without ``apostrophes``, "I'm" becomes "Im"."""
    for long, short in _SHORT_FORMS:
        text = text.replace(long, short if apostrophes else short.replace("'", ""))
    return text


def is_heldout_misspelling(text: str) -> bool:
    """Whether only held-out conversations may contain this misspelled message."""
    return is_heldout_by_hash(_plain(text), 2)


def _misspelled(rng: random.Random, split: Split, question: str, pattern: re.Pattern[str]) -> str:
    """The question with one letter left out, doubled or swapped with its neighbor, in a word that ``pattern`` finds.

    The question stays as it is if it has no such word, or if no drawn misspelling belongs to the split.
    """
    words = list(pattern.finditer(question))
    for _ in range(_TRIES if words else 0):
        word = rng.choice(words)
        at = rng.randrange(word.start() + 1, word.end() - 1)
        kept, letter, after = question[:at], question[at], question[at + 1 :]
        changed = rng.choice(
            (f"{kept}{after}", f"{kept}{letter}{letter}{after}", f"{kept}{after[0]}{letter}{after[1:]}")
        )
        if changed != question and _may_ask(changed, split) and not _shows_other_word(changed, word.start(), split):
            return changed
    return question


def _may_ask(changed: str, split: Split) -> bool:
    return _plain(changed) not in _PHRASINGS and is_heldout_misspelling(changed) == (split == "heldout")


def _shows_other_word(changed: str, start: int, split: Split) -> bool:
    """Whether the misspelled word that begins at ``start`` stands for something else as well.

    The misspelled word may also be a name, such as "Greta" for "great", a misspelling of another word, or a word that
    training must not contain.
    """
    found = _LETTERS.match(changed, start)
    assert found, "the first letter of a word stays as it is"
    word = found[0].lower()
    if word in _AMBIGUOUS or word in _NAMES:
        return True
    return split == "train" and (word in ENGLISH.heldout or is_heldout_word(word))


def _plain(text: str) -> str:
    return text.lower().rstrip("?.! ")


_NAMES = frozenset(name.lower() for name in (*STRANGERS.train, *STRANGERS.heldout))
_PHRASINGS = frozenset(
    _plain(phrasing)
    for topic in (*CHITCHAT.identity, *CHITCHAT.greetings, *CHITCHAT.smalltalk)
    for phrasing in (*topic.train, *topic.heldout)
)
