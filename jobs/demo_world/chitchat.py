"""Questions that need neither facts nor tools: who the assistant is, greetings, and small talk."""

import random

from jobs.demo_world.exchange import Exchange
from jobs.demo_world.tables import Phrasings, Split, Table, Words, draw_phrasings, read_content
from jobs.demo_world.words import outside


class Topic(Phrasings):
    """Questions that share one answer. A right answer contains at least one phrase of ``expected``."""

    answer: str
    expected: tuple[str, ...]


class Chitchat(Table):
    """The content of ``content/chitchat.toml``.

    An opener is a sentence that may come before a question. Endings are signs, or words such as "lol", that may come at
    the end of a message.
    """

    system_messages: tuple[str, ...]
    openers: Phrasings
    endings: Words
    identity: tuple[Topic, ...]
    greetings: tuple[Topic, ...]
    smalltalk: tuple[Topic, ...]


CHITCHAT = read_content("chitchat", Chitchat)


def small_talk(rng: random.Random, split: Split, topics: tuple[Topic, ...]) -> Exchange:
    """Draw a question of one of ``topics``, with its answer."""
    topic = draw_phrasings(rng, topics)
    return Exchange(rng.choice(topic.of(split)).format(**outside(rng, split)), topic.answer, topic.expected)
