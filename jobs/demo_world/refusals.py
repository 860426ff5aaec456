"""Questions that the model cannot answer. The model learns to say so instead of inventing an answer."""

import random

from jobs.demo_world.exchange import Exchange
from jobs.demo_world.facts import PEOPLE, Entity, names, relations_of
from jobs.demo_world.phrasings import RELATIONS, SUBJECTS, fill
from jobs.demo_world.tables import Phrasings, Split, Table, read_content
from jobs.demo_world.words import STRANGERS, stranger


class UnknownTopic(Phrasings):
    """Questions with the same sort of answer, which says why the model cannot answer them."""

    answer: str


class UnknownValues(Phrasings):
    """Values that a relation has for nobody in Saltmere, such as a pet that nobody has."""

    answer: str


class Refusals(Table):
    """The content of ``content/refusals.toml``, explained there."""

    answer_about_person: str
    expected: tuple[str, ...]
    topics: tuple[UnknownTopic, ...]
    places: Phrasings
    things: Phrasings
    values: dict[str, UnknownValues]


_REFUSALS = read_content("refusals", Refusals)

# Shares of the three sorts of questions, in percent. Questions about unknown names are most frequent: they sound like
# questions about the people of Saltmere, so a model easily invents an answer.
_STRANGER, _NO_SUCH_VALUE, _ELSEWHERE = 36, 24, 40


def refusal(rng: random.Random, split: Split) -> Exchange:
    """Draw a question that the model cannot answer."""
    sort = rng.choices(("person", "value", "world"), (_STRANGER, _NO_SUCH_VALUE, _ELSEWHERE))[0]
    if sort == "person":
        entity = Entity(name=stranger(rng, split), pronoun=rng.choice(("she", "he")))
        asked = RELATIONS[rng.choice(relations_of(PEOPLE[0]))].questions
        frames = rng.choice((asked, asked, SUBJECTS.who_is, SUBJECTS.portrait))
        question = fill(rng.choice(frames.of(split)), entity)
        answer = _REFUSALS.answer_about_person.format(name=entity.name)
    elif sort == "value":
        relation = rng.choice(tuple(_REFUSALS.values))
        unknown = _REFUSALS.values[relation]
        value = rng.choice(unknown.of(split))
        question = fill(rng.choice(RELATIONS[relation].reverse.of(split)), PEOPLE[0], value)
        answer = fill(unknown.answer, PEOPLE[0], value)
    else:
        # Each topic is drawn as often as its share of the phrasings.
        topic = rng.choices(_REFUSALS.topics, [len(topic.train) for topic in _REFUSALS.topics])[0]
        fields = {
            "place": rng.choice(_REFUSALS.places.of(split)),
            "thing": rng.choice(_REFUSALS.things.of(split)),
            "person": rng.choice(STRANGERS.of(split)),
        }
        question = rng.choice(topic.of(split)).format(**fields)
        answer = topic.answer.format(**fields)
    return Exchange(question, answer, _REFUSALS.expected, names(PEOPLE))
