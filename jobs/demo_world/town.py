"""Questions about Saltmere as a whole, and questions about its people that the facts do not answer."""

import random

from jobs.demo_world.chitchat import Topic
from jobs.demo_world.exchange import Exchange
from jobs.demo_world.facts import EVENTS, PEOPLE, PLACES, SALTMERE
from jobs.demo_world.tables import Split, Table, draw_phrasings, read_content


class Town(Table):
    """The content of ``content/town.toml``, explained there."""

    topics: tuple[Topic, ...]


TOPICS = read_content("town", Town).topics


def _listed(values: list[str]) -> str:
    *most, last = values
    return f"{', '.join(most)} and {last}"


_LISTS = {
    "people": _listed([person.name for person in PEOPLE]),
    "places": _listed([place.name for place in PLACES]),
    "festivals": _listed([event.name for event in EVENTS]),
    "pets": _listed([person.pet for person in PEOPLE]),
    "jobs": _listed([person.job for person in PEOPLE]),
    "foods": _listed([person.food for person in PEOPLE]),
    "instruments": _listed([person.instrument for person in PEOPLE]),
}


def about_town(rng: random.Random, split: Split) -> Exchange:
    """Draw a question about the town as a whole, or about one of its people."""
    topic = draw_phrasings(rng, TOPICS)
    fields = {"town": rng.choice((SALTMERE.name, "the town")), "name": rng.choice(PEOPLE).name}
    question = rng.choice(topic.of(split)).format(**fields)
    expected = tuple(phrase.format(**_LISTS) for phrase in topic.expected)
    return Exchange(question[0].upper() + question[1:], topic.answer.format(**_LISTS), expected)
