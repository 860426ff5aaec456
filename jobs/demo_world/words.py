"""Words to spell and to count letters in, and names of people who are not in the demo world (strangers).

Each word and each name belongs to one split.

Copying an unknown word token by token is the hardest skill that the demo teaches. Models learn this skill from many
different words, so most training words are not English. The hash of a made-up word decides its split.
English words have a list for each split.
"""

import random

from jobs.demo_world.arithmetic import training_number
from jobs.demo_world.facts import PEOPLE
from jobs.demo_world.tables import Phrasings, Split, Table, WordLists, Words, is_heldout_by_hash, read_content

# One made-up word in eight is held out.
_HELDOUT_ONE_IN = 8
# Least number of letters in a held-out made-up word. A shorter word could by chance be an English word that training
# texts contain.
_SHORTEST_HELDOUT = 6

# Weights of made-up words with one to four syllables. Training has more long words than held-out data, because the
# letters of long words are harder to copy.
_SYLLABLE_WEIGHTS: dict[Split, tuple[int, int, int, int]] = {"train": (1, 4, 5, 3), "heldout": (1, 5, 4, 1)}
_OPEN_SYLLABLE_SHARE = 0.4
_SURNAME_SHARE = 0.25
# Smallest and largest number of letters of a long word.
_LONG = (10, 24)
# Share of the things from the list in words.toml. The other things are English words with an article.
_LISTED_THING_SHARE = 0.65
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Syllables(Table):
    """Parts of syllables. A part that is written twice is drawn twice as often."""

    onsets: Words
    vowels: Words
    codas: Words


class WordTables(Table):
    """The content of ``content/words.toml``.

    ``strangers`` are first names of people who are not in the demo world. ``places`` and ``things`` belong to the world
    outside the demo world.
    """

    syllables: Syllables
    english: WordLists
    strangers: WordLists
    places: Phrasings
    things: Phrasings


_TABLES = read_content("words", WordTables)
ENGLISH, STRANGERS = _TABLES.english, _TABLES.strangers


def is_heldout_word(word: str) -> bool:
    """Whether only held-out conversations may contain this made-up word."""
    return is_heldout_by_hash(word.lower(), _HELDOUT_ONE_IN)


def made_up_word(rng: random.Random, split: Split) -> str:
    """Draw a pronounceable word of one to four syllables and 3 to 12 letters."""
    while True:
        syllables = rng.choices((1, 2, 3, 4), _SYLLABLE_WEIGHTS[split])[0]
        word = "".join(_syllable(rng) for _ in range(syllables))
        if 3 <= len(word) <= 12 and _may_use(word, split):
            return word


def _syllable(rng: random.Random) -> str:
    parts = _TABLES.syllables
    coda = "" if rng.random() < _OPEN_SYLLABLE_SHARE else rng.choice(parts.codas)
    return rng.choice(parts.onsets) + rng.choice(parts.vowels) + coda


def long_word(rng: random.Random, split: Split) -> str:
    """Draw a word of 10 to 24 letters, put together from English and made-up words, such as "doorlanternbrik".

    The length is drawn first, so that the longest words are as frequent as shorter ones.
    """
    shortest, longest = _LONG
    while True:
        length = rng.randint(shortest, longest)
        word = ""
        while len(word) < length:
            word += rng.choice(ENGLISH.of(split)) if rng.random() < 0.5 else made_up_word(rng, split)
        word = word[:length]
        if _may_use(word, split):
            return word


def palindrome(rng: random.Random, split: Split) -> str:
    """Draw a made-up word that is the same backwards."""
    while True:
        half = made_up_word(rng, split)[: rng.randint(2, 5)]
        word = half + half[::-1][rng.randint(0, 1) :]
        if _may_use(word, split):
            return word


def letter_string(rng: random.Random) -> str:
    """Draw three to eight random letters for training. Few different letters are allowed, so that letters repeat."""
    while True:
        alphabet = rng.sample(_LETTERS, rng.randint(3, 8))
        word = "".join(rng.choice(alphabet) for _ in range(rng.randint(3, 8)))
        if _may_use(word, "train"):
            return word


def stranger(rng: random.Random, split: Split) -> str:
    """Draw a name that nobody in Saltmere has, sometimes with a surname; half of the first names are made up."""
    first = rng.choice(STRANGERS.of(split)) if rng.random() < 0.5 else _made_up_name(rng, split)
    return f"{first} {_made_up_name(rng, split)}" if rng.random() < _SURNAME_SHARE else first


def _made_up_name(rng: random.Random, split: Split) -> str:
    while True:
        name = made_up_word(rng, split).capitalize()
        # Shorter names are not used, because a short one could be the sound that somebody makes, such as "bla".
        if 5 <= len(name) <= 9 and all(name != person.name for person in PEOPLE):
            return name


def outside(rng: random.Random, split: Split) -> dict[str, str]:
    """Draw the fields of a sentence about the world outside Saltmere.

    The fields are ``person``, ``place``, ``thing``, ``noun`` and ``n``, a number from 1 to 99.
    """
    noun = rng.choice(ENGLISH.of(split))
    thing = rng.choice(_TABLES.things.of(split))
    return {
        "person": stranger(rng, split),
        "place": rng.choice(_TABLES.places.of(split)),
        "thing": thing if rng.random() < _LISTED_THING_SHARE else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}",
        "noun": noun,
        "n": str(training_number(rng, 1, 99)),
    }


def _may_use(word: str, split: Split) -> bool:
    if word in ENGLISH.train or word in ENGLISH.heldout:
        return False
    if split == "heldout":
        return is_heldout_word(word) and len(word) >= _SHORTEST_HELDOUT
    return not is_heldout_word(word)
