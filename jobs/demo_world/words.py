"""Words to spell and to count letters in, and names of people who are not in the demo world (strangers).

Each word and each name belongs to one split.

Copying an unknown word token by token is the hardest skill that the demo teaches. Models learn it from many different
words, so most training words are made up. The hash of a made-up word decides its split; English words have a table per
split.
"""

import random

from jobs.demo_world.facts import PEOPLE
from jobs.demo_world.tables import Split, Table, WordLists, Words, is_heldout_by_hash, read_content

# One made-up word in eight is held out.
_HELDOUT_ONE_IN = 8
# Least number of letters in a held-out made-up word. A shorter word could by chance be an English word that training
# texts contain.
_SHORTEST_HELDOUT = 6

_OPEN_SYLLABLE_SHARE = 0.4
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Syllables(Table):
    """Parts of syllables. A part that is written twice is drawn twice as often."""

    onsets: Words
    vowels: Words
    codas: Words


class WordTables(Table):
    """The content of ``content/words.toml``. ``strangers`` are first names of people who are not in the demo world."""

    syllables: Syllables
    english: WordLists
    strangers: WordLists


_TABLES = read_content("words", WordTables)
ENGLISH, STRANGERS = _TABLES.english, _TABLES.strangers


def is_heldout_word(word: str) -> bool:
    """Whether only held-out conversations may contain this made-up word."""
    return is_heldout_by_hash(word.lower(), _HELDOUT_ONE_IN)


def made_up_word(rng: random.Random, split: Split) -> str:
    """Draw a pronounceable word of one to four syllables and 3 to 12 letters."""
    while True:
        syllables = rng.choices((1, 2, 3, 4), (1, 5, 4, 1))[0]
        word = "".join(_syllable(rng) for _ in range(syllables))
        if 3 <= len(word) <= 12 and _may_use(word, split):
            return word


def _syllable(rng: random.Random) -> str:
    parts = _TABLES.syllables
    coda = "" if rng.random() < _OPEN_SYLLABLE_SHARE else rng.choice(parts.codas)
    return rng.choice(parts.onsets) + rng.choice(parts.vowels) + coda


def letter_string(rng: random.Random) -> str:
    """Draw three to eight random letters for training. The alphabet is small, so that letters repeat."""
    while True:
        alphabet = rng.sample(_LETTERS, rng.randint(3, 8))
        word = "".join(rng.choice(alphabet) for _ in range(rng.randint(3, 8)))
        if _may_use(word, "train"):
            return word


def stranger(rng: random.Random, split: Split) -> str:
    """Draw a first name that nobody in Saltmere has; half of these names are made up."""
    if rng.random() < 0.5:
        return rng.choice(STRANGERS.of(split))
    while True:
        name = made_up_word(rng, split).capitalize()
        if len(name) <= 9 and all(name != person.name for person in PEOPLE):
            return name


def _may_use(word: str, split: Split) -> bool:
    if word in ENGLISH.train or word in ENGLISH.heldout:
        return False
    if split == "heldout":
        return is_heldout_word(word) and len(word) >= _SHORTEST_HELDOUT
    return not is_heldout_word(word)
