"""Questions about the facts, and follow-up questions."""

import dataclasses
import random

from jobs.demo_world.exchange import Exchange
from jobs.demo_world.facts import (
    ENTITIES,
    EVENTS,
    PEOPLE,
    PLACES,
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

# Shares, in percent, of questions that ask for a value, for its owner, for a portrait, and for all inhabitants.
_FORWARD, _REVERSE, _PORTRAIT, _INHABITANTS = 50, 40, 9, 1


def forward(rng: random.Random, split: Split, known: Fact, *, pronoun: bool = False) -> Exchange:
    """Ask for the value of a fact: "What pet does Mara have?"."""
    relation = RELATIONS[known.relation]
    others = (other for other in values_of(known.relation) if other != known.value)
    return Exchange(
        fill(rng.choice(relation.questions.of(split)), known.entity, pronoun=pronoun),
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
    """Ask who a person is, or what a place or festival is."""
    frames = (
        *SUBJECTS.portrait.of(split),
        *(SUBJECTS.who_is if isinstance(entity, Person) else SUBJECTS.what_is).of(split),
    )
    first, second = (fact(entity, relation) for relation in entity.portrait)
    about = forward(rng, split, first).asked(fill(rng.choice(frames), entity))
    more = fill(RELATIONS[second.relation].answer, entity, second.value, pronoun=True)
    return dataclasses.replace(about, answer=f"{about.answer} {more}")


def inhabitants(rng: random.Random, split: Split) -> Exchange:
    """Ask for the names of all people."""
    *most, last = names(PEOPLE)
    answer = f"I know {', '.join(most)} and {last}."
    return Exchange(rng.choice(SUBJECTS.who_lives_here.of(split)), answer, (f"{most[-1]} and {last}",))


def about_facts(rng: random.Random, split: Split) -> Exchange:
    """Draw a question that asks for a value, an owner, a portrait or all inhabitants."""
    sort = rng.choices((forward, reverse, portrait, inhabitants), (_FORWARD, _REVERSE, _PORTRAIT, _INHABITANTS))[0]
    known = rng.choice(all_facts())
    if sort is inhabitants:
        return inhabitants(rng, split)
    if sort is portrait:
        return portrait(rng, split, rng.choice((*PEOPLE, *ENTITIES)))
    if sort is reverse and RELATIONS[known.relation].reverse.train:
        return reverse(rng, split, known)
    return forward(rng, split, known)


_GROUP_WEIGHTS = (6, 2, 2)  # Weights of people, places and festivals, roughly in proportion to their numbers of facts.
# Share of follow-ups that ask the same question about somebody else. The other follow-ups ask about the same subject.
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
