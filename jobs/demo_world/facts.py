"""The facts of Saltmere: its people, places, festivals and the town itself.

Each value occurs once in its column. Therefore each fact can be asked for in both directions ("What pet does Mara
have?", "Who has a cat?"), and each question has one right answer.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import Literal

TOWN = "Saltmere"

Pronoun = Literal["she", "he", "it"]


@dataclasses.dataclass(frozen=True)
class Entity:
    """A person, place, festival or town that has facts."""

    name: str
    pronoun: Pronoun


@dataclasses.dataclass(frozen=True)
class Person(Entity):
    home: str
    job: str
    duty: str
    food: str
    pet: str
    color: str
    instrument: str


@dataclasses.dataclass(frozen=True)
class Place(Entity):
    location: str
    built: str
    fame: str


@dataclasses.dataclass(frozen=True)
class Event(Entity):
    month: str
    first_held: str
    custom: str


@dataclasses.dataclass(frozen=True)
class Town(Entity):
    island: str
    sea: str
    river: str
    inhabitants: str
    founded: str
    flag: str


@dataclasses.dataclass(frozen=True)
class Fact:
    """The ``relation`` of ``entity`` is ``value``; each column of the tables below is a relation."""

    entity: Entity
    relation: str
    value: str


# fmt: off
PEOPLE = (
    Person("Mara", "she", "the lighthouse", "lighthouse keeper", "keeps the lighthouse",
           "plum cake", "a cat", "blue", "the fiddle"),
    Person("Tobin", "he", "the mill", "baker", "bakes the bread",
           "honey bread", "a hedgehog", "yellow", "the drum"),
    Person("Odile", "she", "the boathouse", "shipbuilder", "builds the ships",
           "oyster soup", "an otter", "green", "the accordion"),
    Person("Fenn", "he", "the houseboat", "fisherman", "catches the fish",
           "smoked herring", "a seal", "silver", "the harmonica"),
    Person("Isolde", "she", "the abbey", "librarian", "looks after the books",
           "almond biscuits", "an owl", "purple", "the harp"),
    Person("Bram", "he", "the stone cottage", "blacksmith", "forges the anchors",
           "mutton stew", "a dog", "black", "the bagpipes"),
    Person("Petra", "she", "the corner house", "doctor", "heals the sick",
           "pear tart", "a rabbit", "white", "the flute"),
    Person("Quill", "he", "the treehouse", "postman", "brings the letters",
           "cheese pie", "a pigeon", "red", "the trumpet"),
    Person("Juniper", "she", "the greenhouse", "gardener", "grows the vegetables",
           "tomato salad", "a tortoise", "orange", "the guitar"),
    Person("Osric", "he", "the clock tower", "clockmaker", "mends the clocks",
           "mushroom omelette", "a mouse", "gold", "the organ"),
    Person("Sunniva", "she", "the schoolhouse", "teacher", "teaches the children",
           "apple dumplings", "a goat", "pink", "the piano"),
    Person("Corwin", "he", "the ferry hut", "ferryman", "steers the ferry",
           "barley porridge", "a parrot", "brown", "the banjo"),
    Person("Linnea", "she", "the caravan", "painter", "paints the pictures",
           "cherry jam", "a goose", "turquoise", "the cello"),
    Person("Rufus", "he", "the inn", "innkeeper", "runs the inn",
           "roast duck", "a donkey", "grey", "the tuba"),
)

PLACES = (
    Place("the lighthouse", "it", "on Gull Rock", "1712", "its green lamp"),
    Place("the mill", "it", "on Windy Hill", "1745", "its striped sails"),
    Place("the abbey", "it", "in Elder Wood", "1390", "its silent garden"),
    Place("the clock tower", "it", "on Market Square", "1803", "its singing bells"),
    Place("the inn", "it", "on Anchor Street", "1688", "its warm fireplace"),
    Place("the bakery", "it", "in Ginger Lane", "1856", "its cinnamon buns"),
    Place("the library", "it", "in Lantern Street", "1777", "its old maps"),
    Place("the bridge", "it", "over the river Silt", "1534", "its stone lions"),
    Place("the boathouse", "it", "on Seal Beach", "1820", "its round windows"),
)

EVENTS = (
    Event("the Lantern Festival", "it", "in October", "1731", "people float paper lanterns"),
    Event("the Herring Fair", "it", "in March", "1650", "people sell salted fish"),
    Event("the Kite Day", "it", "in May", "1882", "people fly paper kites"),
    Event("the Snow Ball", "it", "in January", "1795", "people dance in masks"),
    Event("the Pie Contest", "it", "in August", "1840", "people bake giant pies"),
    Event("the Great Regatta", "it", "in June", "1769", "people race wooden boats"),
)
# fmt: on

SALTMERE = Town(TOWN, "it", "the island of Orrin", "the Amber Sea", "the river Silt", "843", "1204", "a white gull")

ENTITIES: tuple[Entity, ...] = (*PEOPLE, *PLACES, *EVENTS, SALTMERE)


def relations_of(entity: Entity) -> tuple[str, ...]:
    """The relations that ``entity`` has."""
    inherited = {field.name for field in dataclasses.fields(Entity)}
    return tuple(field.name for field in dataclasses.fields(entity) if field.name not in inherited)


def fact(entity: Entity, relation: str) -> Fact:
    return Fact(entity, relation, getattr(entity, relation))


@functools.cache
def all_facts() -> tuple[Fact, ...]:
    """Every fact once, in the order of the tables."""
    return tuple(fact(entity, relation) for entity in ENTITIES for relation in relations_of(entity))


@functools.cache
def values_of(relation: str) -> tuple[str, ...]:
    """All values that ``relation`` takes, in the order of the tables."""
    return tuple(known.value for known in all_facts() if known.relation == relation)


def siblings(entity: Entity) -> tuple[Entity, ...]:
    """The other entities of the same type."""
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
