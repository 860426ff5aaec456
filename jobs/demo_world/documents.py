"""Short texts for pretraining: the facts in prose and stories, texts that teach copying, and dialogues."""

import random
from collections.abc import Callable, Iterator, Mapping

from jobs.demo_world import words
from jobs.demo_world.arithmetic import OPERATORS, draw_sum, training_number
from jobs.demo_world.conversations import draw
from jobs.demo_world.expressions import draw_chain, draw_decimal
from jobs.demo_world.facts import ENTITIES, EVENTS, PEOPLE, PLACES, Entity, Person, fact, key, relations_of
from jobs.demo_world.phrasings import OBJECT, POSSESSIVE, RELATIONS, fill
from jobs.demo_world.seeding import generator
from jobs.demo_world.tables import Table, read_content
from jobs.demo_world.tool_questions import QUESTIONS


class Documents(Table):
    """The content of ``content/documents.toml``, explained there. The keys of ``operators`` are signs such as ``+``."""

    stories: tuple[str, ...]
    weather: tuple[str, ...]
    times: tuple[str, ...]
    ledgers: tuple[str, ...]
    echoes: tuple[str, ...]
    spellings: tuple[str, ...]
    codes: tuple[str, ...]
    sums: tuple[str, ...]
    dialogues: tuple[str, ...]
    operators: dict[str, tuple[str, ...]]


_TEXTS = read_content("documents", Documents)

Writer = Callable[[random.Random], str]


def _state(rng: random.Random, entity: Entity, relation: str, *, pronoun: bool = False) -> str:
    template = rng.choice(RELATIONS[relation].statements)
    return fill(template, entity, fact(entity, relation).value, pronoun=pronoun)


def _portrait(rng: random.Random) -> str:
    """A text with three to six facts about one person, place or festival, or about the town.

    After the first sentence, a pronoun often replaces the name.
    """
    # People are drawn twice as often as other entities because they have about twice as many facts.
    entity = rng.choice((*ENTITIES, *PEOPLE))
    relations = list(relations_of(entity))
    rng.shuffle(relations)
    relations = relations[: rng.randint(3, 6)]
    return " ".join(
        _state(rng, entity, relation, pronoun=i > 0 and rng.random() < 0.4) for i, relation in enumerate(relations)
    )


def _comparison(rng: random.Random) -> str:
    """A text that states one relation for several people or places, and so teaches which value belongs to whom."""
    entities = rng.sample(rng.choice((PEOPLE, PEOPLE, PLACES)), rng.randint(3, 5))
    relation = rng.choice(relations_of(entities[0]))
    if rng.random() < 0.5:
        answer = RELATIONS[relation].answer
        return " ".join(fill(answer, entity, fact(entity, relation).value) for entity in entities)
    return " ".join(_state(rng, entity, relation) for entity in entities)


def _story(rng: random.Random) -> str:
    """A story about two people that agrees with the facts."""
    first, second = rng.sample(PEOPLE, 2)
    event, place = rng.choice(EVENTS), rng.choice(PLACES)
    return rng.choice(_TEXTS.stories).format(
        **_story_fields("a", first),
        **_story_fields("b", second),
        weather=rng.choice(_TEXTS.weather),
        time=rng.choice(_TEXTS.times),
        place=f"at {place.name} {place.location}",
        event=event.name,
        month=event.month,
        custom=event.custom,
    )


def _story_fields(who: str, person: Person) -> dict[str, str]:
    """Fields of a story template for one person: ``a`` is "Mara", ``a_food`` is "plum cake", ``A_subj`` is "She"."""
    pronouns = {"subj": person.pronoun, "own": POSSESSIVE[person.pronoun], "obj": OBJECT[person.pronoun]}
    fields = person.model_dump() | {"pet": key(person.pet)} | pronouns
    named = {who: person.name} | {f"{who}_{field}": value for field, value in fields.items()}
    return named | {f"{who.upper()}_{field}": pronoun.capitalize() for field, pronoun in pronouns.items()}


def _lines(least: int, most: int) -> Callable[[Writer], Writer]:
    """Turn the writer of a line into a writer of ``least`` to ``most`` lines."""
    return lambda line: lambda rng: " ".join(line(rng) for _ in range(rng.randint(least, most)))


@_lines(2, 5)
def _ledger(rng: random.Random) -> str:
    """A line in which each number occurs twice."""
    person = rng.choice(PEOPLE)
    items, others = rng.sample(QUESTIONS.items, 2)
    return rng.choice(_TEXTS.ledgers).format(
        n=training_number(rng), m=training_number(rng), long=draw_sum(rng, "train", rng.choice(OPERATORS)).result,
        items=items, others=others, name=person.name, home=person.home,
    )  # fmt: skip


def _word(rng: random.Random) -> str:
    pick = rng.random()
    if pick < 0.3:
        return rng.choice(words.ENGLISH.train)
    return words.made_up_word(rng, "train") if pick < 0.75 else words.letter_string(rng)


@_lines(2, 4)
def _echo(rng: random.Random) -> str:
    """A line in which each word or list of words occurs at least twice."""
    listed = ", ".join(_word(rng) for _ in range(rng.randint(2, 4)))
    return rng.choice(_TEXTS.echoes).format(name=rng.choice(PEOPLE).name, list=listed, word=_word(rng))


@_lines(2, 4)
def _spelling(rng: random.Random) -> str:
    """A line that spells a word letter by letter, so that the model learns which letters a token stands for."""
    word = _word(rng)
    name = rng.choice(PEOPLE).name
    return rng.choice(_TEXTS.spellings).format(word=word, letters=" ".join(word), name=name)


@_lines(2, 4)
def _code(rng: random.Random) -> str:
    """A line with words in quotes and without quotes, often with Python code about the letters of a word."""
    word, other = _word(rng), _word(rng)
    return rng.choice(_TEXTS.codes).format(
        word=word, other=other, c=rng.choice(word), first=word[0], other_first=other[0]
    )


@_lines(2, 4)
def _sums(rng: random.Random) -> str:
    """A line that teaches to copy a calculation or its result.

    Most lines have the calculation as people write it and in Python's notation; the others have its code or its result
    twice.
    """
    name = rng.choice(PEOPLE).name
    if rng.random() < 0.5:
        longer = rng.choice((draw_chain, draw_decimal))(rng, "train")
        spelled, code, result = longer.spelled, longer.code, longer.result
    else:
        drawn = draw_sum(rng, "train")
        spelled = rng.choice(_TEXTS.operators[drawn.symbol]).format(a=drawn.a, b=drawn.b)
        code, result = drawn.code, drawn.result
    return rng.choice(_TEXTS.sums).format(spelled=spelled, code=code, result=result, name=name)


_DIALOGUE_KINDS = (
    "fact", "fact", "fact", "arithmetic", "expression", "decimal", "problem", "problem", "counting", "counting",
    "spelling", "comparison", "everyday", "everyday", "smalltalk", "smalltalk", "smalltalk", "identity", "identity",
    "town", "town", "refusal", "refusal", "unsure", "greeting",
)  # fmt: skip


@_lines(1, 3)
def _dialogue(rng: random.Random) -> str:
    """A dialogue of two people of Saltmere: one asks what users ask, and the other answers as the model should."""
    asker, other = rng.sample(PEOPLE, 2)
    (exchange,) = draw(rng, "train", rng.choice(_DIALOGUE_KINDS))
    if isinstance(exchange.answer, str):
        said = f'said: "{exchange.answer}"'
    else:
        code, output, text = (part["text"] for part in exchange.answer)
        said = f'wrote {code}, read {output} and said: "{text}"'
    template = rng.choice(_TEXTS.dialogues)
    return template.format(asker=asker.name, other=other.name, question=exchange.question, said=said)


# The weight of each kind of text, and the function that writes it. The first three kinds teach facts and English. In
# the kinds from ``ledger`` to ``sums``, most words and numbers occur twice. The model can predict the second occurrence
# only by looking back at the first, so it learns early to copy.
_KINDS: Mapping[str, tuple[float, Writer]] = {
    "portrait": (20, _portrait),
    "comparison": (6, _comparison),
    "story": (9, _story),
    "ledger": (8, _ledger),
    "echo": (7, _echo),
    "spelling": (10, _spelling),
    "code": (10, _code),
    "sums": (8, _sums),
    # Dialogues give the tokenizer the words of questions, and teach the model the copying that conversations need.
    "dialogue": (36, _dialogue),
}
DOCUMENT_MIX = {kind: share for kind, (share, _) in _KINDS.items()}


def pretraining_documents(seed: int, n: int, mix: Mapping[str, float] = DOCUMENT_MIX) -> Iterator[str]:
    """Generate ``n`` short texts; none contains a special token, or a number, word or name of the held-out split.

    Equal arguments give equal texts. A smaller ``n`` gives the first ``n`` of the same texts. ``mix`` has the weight of
    each kind; kinds that are not in ``mix`` do not occur.
    """
    rng = generator("documents", seed)
    kinds, weights = tuple(mix), tuple(mix.values())
    for _ in range(n):
        yield _KINDS[rng.choices(kinds, weights)[0]][1](rng)
