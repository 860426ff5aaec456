"""Templates for sentences about facts: statements, questions in both directions, and answers."""

from jobs.demo_world.facts import Entity, Pronoun
from jobs.demo_world.tables import Phrasings, Table, read_content

OBJECT: dict[Pronoun, str] = {"she": "her", "he": "him", "it": "it"}
POSSESSIVE: dict[Pronoun, str] = {"she": "her", "he": "his", "it": "its"}


class Relation(Table):
    """All templates for one relation. ``content/relations.toml`` explains them."""

    statements: tuple[str, ...]
    questions: Phrasings
    reverse: Phrasings
    confirm: Phrasings = Phrasings(train=(), heldout=())
    answer: str


class Subjects(Table):
    """Questions about a whole person, place, festival or town; ``content/subjects.toml`` explains them."""

    portrait: Phrasings
    who_is: Phrasings
    what_is: Phrasings
    same_of_other: Phrasings


RELATIONS = read_content("relations", dict[str, Relation])
SUBJECTS = read_content("subjects", Subjects)


def fill(template: str, entity: Entity, value: str = "", *, pronoun: bool = False) -> str:
    """Fill a template with an entity and a value. If ``pronoun`` is True, a pronoun replaces the entity's name."""
    subject, own = entity.pronoun, POSSESSIVE[entity.pronoun]
    sentence = template.format(
        name=subject if pronoun else entity.name,
        poss=own if pronoun else f"{entity.name}'s",
        obj=OBJECT[subject] if pronoun else entity.name,
        at="there" if pronoun else f"at {entity.name}",
        full=entity.name,
        subj=subject,
        own=own,
        value=value,
        a_value=f"{'an' if value[:1] in 'aeiou' else 'a'} {value}",
    )
    return sentence[0].upper() + sentence[1:]
