"""Questions about the facts, and follow-up questions."""

import dataclasses
import random

from jobs.demo_world.exchange import Exchange
from jobs.demo_world.facts import (
    ENTITIES,
    EVENTS,
    PEOPLE,
    PLACES,
    SALTMERE,
    Entity,
    Fact,
    Person,
    all_facts,
    fact,
    key,
    names,
    relations_of,
    siblings,
    values_of,
)
from jobs.demo_world.phrasings import RELATIONS, SUBJECTS, fill
from jobs.demo_world.tables import Split

# Weights with which the four sorts of questions are drawn. The questions ask for a value, for the owner of a value, for
# a portrait (a description of one person, place, festival or the town), or whether a value is right. If the relation of
# a fact lacks the drawn sort, a question for the value replaces it.
_FORWARD, _REVERSE, _PORTRAIT, _CONFIRM = 46, 38, 8, 8
# Share of the questions about Saltmere that call it "the town".
_TOWN_SHARE = 0.5


def forward(rng: random.Random, split: Split, known: Fact, *, pronoun: bool = False) -> Exchange:
    """Ask for the value of a fact: "What pet does Mara have?"."""
    relation = RELATIONS[known.relation]
    others = (other for other in values_of(known.relation) if other != known.value)
    question = fill(rng.choice(relation.questions.of(split)), known.entity, pronoun=pronoun)
    if known.entity is SALTMERE and rng.random() < _TOWN_SHARE:
        question = question.replace(SALTMERE.name, "the town")
    return Exchange(
        question,
        fill(relation.answer, known.entity, known.value),
        (key(known.value),),
        (*map(key, others), *names(siblings(known.entity))),
    )


def reverse(rng: random.Random, split: Split, known: Fact) -> Exchange:
    """Give the value of a fact and ask for its owner: "Who has a cat?"."""
    relation = RELATIONS[known.relation]
    return Exchange(
        fill(rng.choice(relation.reverse.of(split)), known.entity, known.value),
        fill(relation.answer, known.entity, known.value),
        (key(known.entity.name),),
        names(siblings(known.entity)),
    )


def portrait(rng: random.Random, split: Split, entity: Entity) -> Exchange:
    """Ask who a person is, or what a place, festival or the town is. The answer, a portrait, states two facts."""
    frames = (
        *SUBJECTS.portrait.of(split),
        *(SUBJECTS.who_is if isinstance(entity, Person) else SUBJECTS.what_is).of(split),
    )
    first, second = (fact(entity, relation) for relation in entity.portrait)
    about = forward(rng, split, first).asked(fill(rng.choice(frames), entity))
    more = fill(RELATIONS[second.relation].answer, entity, second.value, pronoun=True)
    return dataclasses.replace(about, answer=f"{about.answer} {more}")


def confirm(rng: random.Random, split: Split, known: Fact) -> Exchange:
    """Ask whether a value is right: "Does Mara have a cat?".

    The value in the question is wrong in almost half of the questions. The answer states the fact, without yes or no.
    """
    asked = rng.choice((known.value, rng.choice(values_of(known.relation))))
    question = fill(rng.choice(RELATIONS[known.relation].confirm.of(split)), known.entity, asked)
    return forward(rng, split, known).asked(question)


# The facts of the town are drawn twice as often as others, so that its two names, "Saltmere" and "the town", are each
# asked about as often as another name.
_ASKED = (*all_facts(), *(known for known in all_facts() if known.entity is SALTMERE))


def about_facts(rng: random.Random, split: Split) -> Exchange:
    """Draw a question about a fact (:func:`forward`, :func:`reverse`, :func:`confirm`) or for a :func:`portrait`."""
    sort = rng.choices((forward, reverse, portrait, confirm), (_FORWARD, _REVERSE, _PORTRAIT, _CONFIRM))[0]
    known = rng.choice(_ASKED)
    if sort is confirm and RELATIONS[known.relation].confirm.train:
        return confirm(rng, split, known)
    if sort is portrait:
        return portrait(rng, split, rng.choice((*PEOPLE, *ENTITIES)))
    if sort is reverse and RELATIONS[known.relation].reverse.train:
        return reverse(rng, split, known)
    return forward(rng, split, known)


# Weights of people, places and festivals, roughly in proportion to their numbers of facts.
_GROUP_WEIGHTS = (6, 2, 2)
# Share of follow-ups that ask the first question again, about another person, place or festival. The other follow-ups
# ask further questions about the person, place or festival of the first question.
_OTHER_SUBJECT_SHARE = 0.25


def follow_up(rng: random.Random, split: Split) -> list[Exchange]:
    """Draw two or three exchanges. The later questions make sense only after the first question."""
    group = rng.choices((PEOPLE, PLACES, EVENTS), _GROUP_WEIGHTS)[0]
    entity: Entity = rng.choice(group)
    relations = list(relations_of(entity))
    rng.shuffle(relations)
    first = fact(entity, relations.pop())
    if rng.random() < _OTHER_SUBJECT_SHARE:
        other: Entity = rng.choice(siblings(entity))
        question = rng.choice(SUBJECTS.same_of_other.of(split)).format(name=other.name)
        return [forward(rng, split, first), forward(rng, split, fact(other, first.relation)).asked(question)]
    exchanges = [reverse(rng, split, first) if rng.random() < 0.35 else forward(rng, split, first)]
    for _ in range(rng.choices((1, 2), (4, 1))[0]):
        more = forward(rng, split, fact(entity, relations.pop()), pronoun=True)
        exchanges.append(more.asked(_joined("And", more.question)) if rng.random() < 0.3 else more)
    return exchanges


def _joined(opener: str, question: str) -> str:
    rest = question if question.startswith("I ") else question[0].lower() + question[1:]
    return f"{opener} {rest}"
