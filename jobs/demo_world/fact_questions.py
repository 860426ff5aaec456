"""Questions that the fact tables answer, alone and as follow-ups."""

from __future__ import annotations

import dataclasses
import random

from jobs.demo_world.exchange import Exchange
from jobs.demo_world.facts import (
    EVENTS,
    PEOPLE,
    PLACES,
    SALTMERE,
    Entity,
    Event,
    Fact,
    Person,
    Place,
    Town,
    all_facts,
    fact,
    key,
    names,
    relations_of,
    siblings,
    values_of,
)
from jobs.demo_world.phrasings import (
    PORTRAIT,
    RELATIONS,
    SAME_OF_OTHER,
    WHAT_IS,
    WHO_IS,
    WHO_LIVES_HERE,
    Split,
    fill,
)

# Shares of the sorts of question, in percent. One half asks for a value; asking whose a value is is harder to learn.
_FORWARD, _REVERSE, _PORTRAIT, _INHABITANTS = 50, 40, 9, 1


def forward(rng: random.Random, split: Split, known: Fact, *, pronoun: bool = False) -> Exchange:
    """Asks for the value."""
    relation = RELATIONS[known.relation]
    others = (other for other in values_of(known.relation) if other != known.value)
    return Exchange(
        fill(rng.choice(relation.questions.of(split)), known.entity, pronoun=pronoun),
        fill(relation.answer, known.entity, known.value),
        (key(known.value),),
        (*map(key, others), *names(siblings(known.entity))),
    )


def reverse(rng: random.Random, split: Split, known: Fact) -> Exchange:
    """Gives the value and asks whose it is."""
    relation = RELATIONS[known.relation]
    return Exchange(
        fill(rng.choice(relation.reverse.of(split)), known.entity, known.value),
        fill(relation.answer, known.entity, known.value),
        (key(known.entity.name),),
        names(siblings(known.entity)),
    )


# What a portrait tells, most telling first.
_PORTRAIT_RELATIONS: dict[type[Entity], tuple[str, str]] = {
    Person: ("job", "home"),
    Place: ("location", "fame"),
    Event: ("month", "custom"),
    Town: ("island", "flag"),
}


def portrait(rng: random.Random, split: Split, entity: Entity) -> Exchange:
    """Asks who or what somebody or something is."""
    frames = (*PORTRAIT.of(split), *(WHO_IS if isinstance(entity, Person) else WHAT_IS).of(split))
    first, second = (fact(entity, relation) for relation in _PORTRAIT_RELATIONS[type(entity)])
    about = forward(rng, split, first).asked(fill(rng.choice(frames), entity))
    more = fill(RELATIONS[second.relation].answer, entity, second.value, pronoun=True)
    return dataclasses.replace(about, answer=f"{about.answer} {more}")


def inhabitants(rng: random.Random, split: Split) -> Exchange:
    """Asks for all the people."""
    *most, last = names(PEOPLE)
    answer = f"I know {', '.join(most)} and {last}."
    return Exchange(rng.choice(WHO_LIVES_HERE.of(split)), answer, (f"{most[-1]} and {last}",))


def about_facts(rng: random.Random, split: Split) -> Exchange:
    """Any question that the fact tables answer."""
    sort = rng.choices((forward, reverse, portrait, inhabitants), (_FORWARD, _REVERSE, _PORTRAIT, _INHABITANTS))[0]
    known = rng.choice(all_facts())
    if sort is inhabitants:
        return inhabitants(rng, split)
    if sort is portrait:
        return portrait(rng, split, rng.choice((*PEOPLE, *PEOPLE, *PLACES, *EVENTS, SALTMERE)))
    if sort is reverse and RELATIONS[known.relation].reverse.train:
        return reverse(rng, split, known)
    return forward(rng, split, known)


_SUBJECTS = (PEOPLE, PLACES, EVENTS)
_SUBJECT_WEIGHTS = (6, 2, 2)  # as many as their facts, roughly
# How many follow-ups ask the same of somebody else; the others ask more about the same subject.
_OTHER_SUBJECT_SHARE = 0.25


def follow_up(rng: random.Random, split: Split) -> list[Exchange]:
    """Two or three exchanges of which the later make sense only after the first."""
    group = rng.choices(_SUBJECTS, _SUBJECT_WEIGHTS)[0]
    entity: Entity = rng.choice(group)
    relations = list(relations_of(entity))
    rng.shuffle(relations)
    first = fact(entity, relations.pop())
    if rng.random() < _OTHER_SUBJECT_SHARE:
        other: Entity = rng.choice(siblings(entity))
        question = rng.choice(SAME_OF_OTHER.of(split)).format(name=other.name)
        return [forward(rng, split, first), forward(rng, split, fact(other, first.relation)).asked(question)]
    exchanges = [reverse(rng, split, first) if rng.random() < 0.35 else forward(rng, split, first)]
    for _ in range(rng.choices((1, 2), (4, 1))[0]):
        more = forward(rng, split, fact(entity, relations.pop()), pronoun=True)
        exchanges.append(more.asked(_joined("And", more.question)) if rng.random() < 0.3 else more)
    return exchanges


def _joined(opener: str, question: str) -> str:
    rest = question if question.startswith("I ") else question[0].lower() + question[1:]
    return f"{opener} {rest}"
