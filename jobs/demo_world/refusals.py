"""Questions that the model cannot answer. The model learns to say so instead of inventing an answer."""

import random

from jobs.demo_world.exchange import Exchange
from jobs.demo_world.facts import PEOPLE, Entity, names, relations_of
from jobs.demo_world.phrasings import RELATIONS, SUBJECTS, fill
from jobs.demo_world.tables import Phrasings, Split, Table, draw_phrasings, read_content
from jobs.demo_world.words import outside, stranger


class UnknownTopic(Phrasings):
    """Questions with the same answer, which says why the model cannot answer them."""

    answer: str


class UnknownValues(Phrasings):
    """Values that a relation has for nobody in Saltmere, such as pets that nobody has, and the answer to them."""

    answer: str


class Refusals(Table):
    """The content of ``content/refusals.toml``, explained there."""

    answer_about_person: str
    expected: tuple[str, ...]
    about_person: Phrasings
    topics: tuple[UnknownTopic, ...]
    values: dict[str, UnknownValues]


REFUSALS = read_content("refusals", Refusals)

# Shares of the three sorts of questions, in percent: about a person who is not in Saltmere, about a value that nobody
# in Saltmere has, and about the rest of the world. The first sort has a large share, because a question about an
# unknown name sounds like a question about somebody in Saltmere, so a model easily invents an answer.
_STRANGER, _NO_SUCH_VALUE, _ELSEWHERE = 22, 12, 66


def refusal(rng: random.Random, split: Split) -> Exchange:
    """Draw a question that the model cannot answer."""
    sort = rng.choices(("person", "value", "world"), (_STRANGER, _NO_SUCH_VALUE, _ELSEWHERE))[0]
    if sort == "person":
        entity = Entity(name=stranger(rng, split), pronoun=rng.choice(("she", "he")))
        asked = RELATIONS[rng.choice(relations_of(PEOPLE[0]))].questions
        frame = rng.choice(rng.choice((asked, SUBJECTS.who_is, SUBJECTS.portrait, REFUSALS.about_person)).of(split))
        question = frame.format(person=entity.name) if "{person}" in frame else fill(frame, entity)
        answer = REFUSALS.answer_about_person
    elif sort == "value":
        relation = rng.choice(tuple(REFUSALS.values))
        unknown = REFUSALS.values[relation]
        value = rng.choice(unknown.of(split))
        question = fill(rng.choice(RELATIONS[relation].reverse.of(split)), PEOPLE[0], value)
        answer = unknown.answer
    else:
        topic = draw_phrasings(rng, REFUSALS.topics)
        question = rng.choice(topic.of(split)).format(**outside(rng, split))
        answer = topic.answer
    return Exchange(question, answer, REFUSALS.expected, names(PEOPLE))
