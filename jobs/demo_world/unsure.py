"""Messages with words that belong to no topic of the demo world. The model learns to admit that it is unsure.

A small model that meets a new word gives the answer of some similar question. To learn that it should not answer a
question about an unknown word with confidence, the model needs many such words in training.

A word is *explained* if another topic or a fact uses it. A message of this module contains only unexplained words,
beside the words of its template.
"""

import random
import re

from jobs.demo_world.chitchat import Topic
from jobs.demo_world.exchange import Exchange
from jobs.demo_world.facts import PEOPLE, names
from jobs.demo_world.tables import FOLDER, Split, Table, WordLists, draw_frame, draw_phrasings, read_content
from jobs.demo_world.words import ENGLISH, STRANGERS, made_up_word


class Unsure(Table):
    """The content of ``content/unsure.toml``, explained there."""

    nouns: WordLists
    verbs: WordLists
    adjectives: WordLists
    topics: tuple[Topic, ...]


_UNSURE = read_content("unsure", Unsure)
TOPICS = _UNSURE.topics

# Share of the nouns from the list of unsure.toml. The other nouns are English words of words.toml, of which there are
# more, but not all of them are nouns.
_LISTED_NOUN_SHARE = 0.6
# Share of the messages whose first letter is made a capital. In most templates for whole sentences, it already is one.
_CAPITAL_SHARE = 0.5
# Files whose words do not count as explained: words to spell, sentences of documents, and the words of this module.
_UNEXPLAINED_FILES = ("words", "documents", "unsure")


def _explained_words() -> frozenset[str]:
    """All words in the files of the other topics and of the facts, and the first names of strangers.

    Words in the comments of these files count too, so another comment may change the data.
    """
    files = [path for path in FOLDER.glob("*.toml") if path.stem not in _UNEXPLAINED_FILES]
    texts = [path.read_text(encoding="utf-8") for path in files]
    return frozenset(re.findall("[a-z]+", " ".join((*texts, *STRANGERS.train, *STRANGERS.heldout)).lower()))


EXPLAINED = _explained_words()


def _unexplained(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for word in words if not EXPLAINED & {word, plural(word), word.removesuffix("s")})


def plural(noun: str) -> str:
    """The plural of a regular noun."""
    if re.search("[^aeiou]y$", noun):
        return f"{noun[:-1]}ies"
    return f"{noun}es" if re.search("(s|x|z|ch|sh)$", noun) else f"{noun}s"


_SPLITS: tuple[Split, Split] = ("train", "heldout")
_ENGLISH = {split: _unexplained(ENGLISH.of(split)) for split in _SPLITS}
_NOUNS = {split: _unexplained(_UNSURE.nouns.of(split)) for split in _SPLITS}
_VERBS = {split: _unexplained(_UNSURE.verbs.of(split)) for split in _SPLITS}
_ADJECTIVES = {split: _unexplained(_UNSURE.adjectives.of(split)) for split in _SPLITS}


def unexplained_words(split: Split) -> frozenset[str]:
    """The unexplained words in the lists of a split. Derived forms, such as plurals, are not added."""
    return frozenset((*_ENGLISH[split], *_NOUNS[split], *_VERBS[split], *_ADJECTIVES[split]))


def unsure(rng: random.Random, split: Split) -> Exchange:
    """Draw a message that the model cannot understand, with an answer in which the model admits this."""
    topic = draw_phrasings(rng, TOPICS)
    question = draw_frame(rng, split, topic).format(**_fields(rng, split))
    if rng.random() < _CAPITAL_SHARE:
        question = question[0].upper() + question[1:]
    return Exchange(question, topic.answer, topic.expected, names(PEOPLE))


def _fields(rng: random.Random, split: Split) -> dict[str, str]:
    noun, other = (rng.choice((_NOUNS if rng.random() < _LISTED_NOUN_SHARE else _ENGLISH)[split]) for _ in range(2))
    verb = rng.choice(_VERBS[split])
    stem = verb.removesuffix("e")
    return {
        "noun": noun,
        "nouns": plural(noun),
        "a_noun": f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}",
        "other": other,
        "others": plural(other),
        "verb": verb,
        "verbed": f"{stem}ed",
        "verbing": f"{stem}ing",
        "adjective": rng.choice(_ADJECTIVES[split]),
        "made_up": made_up_word(rng, split),
    }
