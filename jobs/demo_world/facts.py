"""The facts of Saltmere: its people, places, festivals and the town itself.

A relation, such as pet, has each value only once. Therefore a fact can be asked for in both directions ("What pet does
Mara have?", "Who has a cat?"), and each question has one right answer.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import ClassVar, Literal

from jobs.demo_world.tables import Table, read_content

Pronoun = Literal["she", "he", "it"]


class Entity(Table):
    """A person, place, festival or town that has facts. ``portrait`` names the two relations of a short description."""

    portrait: ClassVar[tuple[str, str]]

    name: str
    pronoun: Pronoun


class Person(Entity):
    portrait = ("job", "home")
    home: str
    job: str
    duty: str
    food: str
    pet: str
    color: str
    instrument: str


class Place(Entity):
    portrait = ("location", "fame")
    location: str
    built: str
    fame: str


class Event(Entity):
    portrait = ("month", "custom")
    month: str
    first_held: str
    custom: str


class Town(Entity):
    portrait = ("island", "inhabitants")
    island: str
    sea: str
    river: str
    inhabitants: str
    founded: str
    flag: str


class World(Table):
    people: tuple[Person, ...]
    places: tuple[Place, ...]
    events: tuple[Event, ...]
    town: Town


@dataclasses.dataclass(frozen=True)
class Fact:
    """The ``relation`` of ``entity`` is ``value``: the relation "pet" of Mara is "a cat"."""

    entity: Entity
    relation: str
    value: str


_WORLD = read_content("facts", World)
PEOPLE, PLACES, EVENTS, SALTMERE = _WORLD.people, _WORLD.places, _WORLD.events, _WORLD.town
ENTITIES: tuple[Entity, ...] = (*PEOPLE, *PLACES, *EVENTS, SALTMERE)


def relations_of(entity: Entity) -> tuple[str, ...]:
    """The relations that ``entity`` has."""
    return tuple(field for field in type(entity).model_fields if field not in Entity.model_fields)


def fact(entity: Entity, relation: str) -> Fact:
    return Fact(entity, relation, getattr(entity, relation))


@functools.cache
def all_facts() -> tuple[Fact, ...]:
    """Every fact once, in the order of ``content/facts.toml``."""
    return tuple(fact(entity, relation) for entity in ENTITIES for relation in relations_of(entity))


@functools.cache
def values_of(relation: str) -> tuple[str, ...]:
    """All values that ``relation`` takes, in the order of ``content/facts.toml``."""
    return tuple(known.value for known in all_facts() if known.relation == relation)


def siblings(entity: Entity) -> tuple[Entity, ...]:
    """The other entities of the same type, such as all other people."""
    return tuple(other for other in ENTITIES if type(other) is type(entity) and other != entity)


_LEADING_WORDS = re.compile(r"^(?:(?:a|an|the|its|on|in|over)\s+)+")


def key(value: str) -> str:
    """A value without leading articles and prepositions. A right answer must contain this text.

    ``on Gull Rock`` gives ``Gull Rock``, and ``a cat`` gives ``cat``.
    """
    return _LEADING_WORDS.sub("", value)


def names(entities: Iterable[Entity]) -> tuple[str, ...]:
    """The names of entities, without articles."""
    return tuple(key(entity.name) for entity in entities)


@functools.cache
def world_numbers() -> frozenset[int]:
    """Numbers that occur in facts. They cannot be reserved, because many training texts contain them."""
    return frozenset(int(known.value) for known in all_facts() if known.value.isdigit())
