"""Short texts for pretraining: the facts in prose and stories, and texts that teach copying."""

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping

from jobs.demo_world import words
from jobs.demo_world.arithmetic import OPERATORS, draw_sum, training_number
from jobs.demo_world.conversations import draw
from jobs.demo_world.facts import ENTITIES, EVENTS, PEOPLE, PLACES, Entity, Person, fact, key, relations_of
from jobs.demo_world.phrasings import OBJECT, POSSESSIVE, RELATIONS, fill
from jobs.demo_world.seeding import generator
from jobs.demo_world.tool_questions import ITEMS

# Shares of the kinds, in percent. The first three kinds teach facts and English. In the other kinds most words and
# numbers occur twice. The model can predict the second one only by looking back, so it learns early to copy.
DOCUMENT_MIX: Mapping[str, float] = {
    "portrait": 28,
    "comparison": 7,
    "story": 13,
    "ledger": 9,
    "echo": 7,
    "spelling": 10,
    "code": 10,
    "sums": 6,
    # Dialogues contain the words of questions for the tokenizer, and teach the copying that conversations need.
    "dialogue": 10,
}


def pretraining_documents(seed: int, n: int, mix: Mapping[str, float] = DOCUMENT_MIX) -> Iterator[str]:
    """Generate ``n`` short texts; none contains a special token, or a number, word or name of the held-out split.

    Equal arguments give equal texts, and a smaller ``n`` gives the first of these.

    Args:
        mix: weight of each kind; the other kinds do not occur.
    """
    rng = generator("documents", seed)
    kinds, weights = tuple(mix), tuple(mix.values())
    for _ in range(n):
        yield _WRITERS[rng.choices(kinds, weights)[0]](rng)


def _state(rng: random.Random, entity: Entity, relation: str, *, pronoun: bool = False) -> str:
    template = rng.choice(RELATIONS[relation].statements)
    return fill(template, entity, fact(entity, relation).value, pronoun=pronoun)


def _portrait(rng: random.Random) -> str:
    """Some facts about one person, place or festival. Sentences after the first one often use a pronoun."""
    entity = rng.choice((*ENTITIES, *PEOPLE))  # People are drawn twice as often because they have twice as many facts.
    relations = list(relations_of(entity))
    rng.shuffle(relations)
    relations = relations[: rng.randint(3, 6)]
    return " ".join(
        _state(rng, entity, relation, pronoun=i > 0 and rng.random() < 0.4) for i, relation in enumerate(relations)
    )


def _comparison(rng: random.Random) -> str:
    """A text that states the same relation for several people or places, to teach which value belongs to whom."""
    entities = rng.sample(rng.choice((PEOPLE, PEOPLE, PLACES)), rng.randint(3, 5))
    relation = rng.choice(relations_of(entities[0]))
    if rng.random() < 0.5:
        answer = RELATIONS[relation].answer
        return " ".join(fill(answer, entity, fact(entity, relation).value) for entity in entities)
    return " ".join(_state(rng, entity, relation) for entity in entities)


_WEATHER = ("sunny", "rainy", "windy", "foggy", "snowy", "warm", "cold", "quiet")
_TIMES = ("morning", "afternoon", "evening")
_STORIES = (
    "One {weather} {time} {a} left {a_home} and walked to {b_home} to visit {b}. {A_subj} carried {b_food}, because "
    "that is what {b} likes best. {b} was glad and played {b_instrument}. {A_own} {a_pet} listened, and so did {b_own} "
    "{b_pet}.",
    "It was a {weather} {time} in Saltmere. {a} the {a_job} met {b} the {b_job} {place}. They talked about {event}, "
    "which is held {month}. Then {a} went home to {a_home} and {b} went home to {b_home}.",
    "{a} had lost {a_own} {a_pet}. {A_subj} asked {b}, who {b_duty}, but {b} had only seen {b_own} {b_pet}. In the "
    "{time} the {a_pet} came back to {a_home} all by itself, and {a} played {a_instrument} for joy.",
    "On a {weather} {time} {b} gave {a} a {a_color} coat. {a} was happy, because {a_color} is {a_own} favourite "
    "colour. {A_subj} gave {b} {a_own} thanks and cooked {b_food} for {b_obj}.",
    "{a}, who {a_duty}, was hungry. So {a_subj} went to see {b} in {b_home}. There was {b_food} for {b} and {a_food} "
    "for {a}. After the meal {a} played {a_instrument} and {b} played {b_instrument}.",
    "At {event} {custom}. {a} came with {a_own} {a_pet} and {b} came with {b_own} {b_pet}. {a} wore {a_color} and {b} "
    "wore {b_color}. The {weather} {time} was over too soon.",
    "In the {time} {a} practised {a_instrument} in {a_home}. {b} heard it from far away and took {b_instrument}. Soon "
    "the {a_job} and the {b_job} played together, and the {a_pet} danced with the {b_pet}.",
    "Every {time} {a} {a_duty} and {b} {b_duty}. When the work is done, they meet {place}. {a} eats {a_food}, {b} eats "
    "{b_food}, and they watch the {weather} sky over the sea.",
)


def _story(rng: random.Random) -> str:
    """A story about two people that agrees with the facts."""
    first, second = rng.sample(PEOPLE, 2)
    event, place = rng.choice(EVENTS), rng.choice(PLACES)
    return rng.choice(_STORIES).format(
        **_story_fields("a", first),
        **_story_fields("b", second),
        weather=rng.choice(_WEATHER),
        time=rng.choice(_TIMES),
        place=f"at {place.name} {place.location}",
        event=event.name,
        month=event.month,
        custom=event.custom,
    )


def _story_fields(who: str, person: Person) -> dict[str, str]:
    """Fields of a story template for one person: ``{a}`` is "Mara", ``{a_food}`` "plum cake", ``{A_subj}`` "She"."""
    pronouns = {"subj": person.pronoun, "own": POSSESSIVE[person.pronoun], "obj": OBJECT[person.pronoun]}
    fields = dataclasses.asdict(person) | {"pet": key(person.pet)} | pronouns
    named = {who: person.name} | {f"{who}_{field}": value for field, value in fields.items()}
    return named | {f"{who.upper()}_{field}": pronoun.capitalize() for field, pronoun in pronouns.items()}


def _repeat(rng: random.Random, write: Callable[[random.Random], str], least: int, most: int) -> str:
    return " ".join(write(rng) for _ in range(rng.randint(least, most)))


_LEDGERS = (
    "The ledger says {n} {items}. {name} counted {n} {items}.",
    "There are {n} {items} in {home}. Yes, {n} {items}.",
    "{name} wrote down {n}. The number was {n}.",
    "{name} sold {n} {items} and {m} {others}: first {n}, then {m}.",
    "{n}, {m}, {n}, {m}.",
    "The result is {long}. The answer is {long}.",
    "Python printed {long}. The answer is {long}.",
    "On the box stood {long}, and {name} read aloud: {long}.",
)


def _ledger(rng: random.Random) -> str:
    """Lines in which each number occurs twice."""

    def line(rng: random.Random) -> str:
        person = rng.choice(PEOPLE)
        items, others = rng.sample(ITEMS, 2)
        return rng.choice(_LEDGERS).format(
            n=training_number(rng), m=training_number(rng), long=_result(rng),
            items=items, others=others, name=person.name, home=person.home,
        )  # fmt: skip

    return _repeat(rng, line, 2, 5)


def _result(rng: random.Random) -> str:
    return draw_sum(rng, "train", rng.choice(OPERATORS)).result


def _word(rng: random.Random) -> str:
    pick = rng.random()
    if pick < 0.3:
        return rng.choice(words.ENGLISH_TRAIN)
    return words.made_up_word(rng, "train") if pick < 0.75 else words.letter_string(rng)


_ECHOES = (
    "{name} said {list}. The parrot said {list}.",
    "{list}, {list}.",
    "The password is {word}. {name} whispered {word}.",
    "A ship called {word} came into the harbour. The {word} stayed for a week.",
    "{name} wrote '{word}' on the wall, and everybody read '{word}'.",
    "{name} sang {word}, {word}, {word}.",
)


def _echo(rng: random.Random) -> str:
    """Lines in which each word or list of words occurs twice."""

    def line(rng: random.Random) -> str:
        listed = ", ".join(_word(rng) for _ in range(rng.randint(2, 4)))
        return rng.choice(_ECHOES).format(name=rng.choice(PEOPLE).name, list=listed, word=_word(rng))

    return _repeat(rng, line, 2, 4)


_SPELLINGS = (
    "{word} is spelled {letters}.",
    "The word '{word}' is spelled {letters}.",
    "{letters} spells {word}.",
    "{name} spells {word}: {letters}.",
    "The letters of {word} are {letters}.",
    "The letters {letters} make the word '{word}'.",
)


def _spelling(rng: random.Random) -> str:
    """Words letter by letter. No other kind of text shows which letters a token stands for."""

    def line(rng: random.Random) -> str:
        word = _word(rng)
        name = rng.choice(PEOPLE).name
        return rng.choice(_SPELLINGS).format(word=word, letters=" ".join(word), name=name)

    return _repeat(rng, line, 2, 4)


# The tokens of a word depend on the character before it: a space, a quote or none. These lines show that different
# tokens are the same word.
_CODES = (
    "The word {word} in quotes is '{word}'.",
    "In Python, {word} is '{word}' and {other} is '{other}'.",
    "'{word}' is {word}. '{other}' is {other}.",
    "To count {c} in {word}, write '{word}'.count('{c}').",
    "To count {c} in '{word}', write '{word}'.count('{c}').",
    "'{word}'.count('{c}') counts the letter {c} in {word}.",
    "The letter {c} in the word {word}: '{word}'.count('{c}').",
    "'{word}' starts with '{first}' and {other} starts with '{other_first}'.",
)


def _code(rng: random.Random) -> str:
    """Words in prose and in quotes, and the Python code that counts their letters."""

    def line(rng: random.Random) -> str:
        word, other = _word(rng), _word(rng)
        return rng.choice(_CODES).format(
            word=word, other=other, c=rng.choice(word), first=word[0], other_first=other[0]
        )

    return _repeat(rng, line, 2, 4)


_SPELLED_OPERATORS = {
    "+": ("{a} plus {b}", "the sum of {a} and {b}", "{a}+{b}"),
    "-": ("{a} minus {b}", "{a} less {b}", "{a}-{b}"),
    "*": ("{a} times {b}", "{a} multiplied by {b}", "{a} x {b}", "{a} × {b}", "{a}*{b}", "the product of {a} and {b}"),
    "/": ("{a} divided by {b}", "{a} ÷ {b}", "{a}/{b}", "{a} over {b}"),
}
_SUMS = (
    "In Python, {spelled} is {code}.",
    "For {spelled} we write {code}.",
    "{name} wrote {code} on the board. The children read {code}.",
    "{code} = {result}. The answer is {result}.",
    "{name} calculates {spelled}: {code} = {result}.",
)


def _sums(rng: random.Random) -> str:
    """Calculations in words and in Python's notation; their results are copied from the same line."""

    def line(rng: random.Random) -> str:
        drawn = draw_sum(rng, "train")
        spelled = rng.choice(_SPELLED_OPERATORS[drawn.symbol]).format(a=drawn.a, b=drawn.b)
        name = rng.choice(PEOPLE).name
        return rng.choice(_SUMS).format(spelled=spelled, code=drawn.code, result=drawn.result, name=name)

    return _repeat(rng, line, 2, 4)


_DIALOGUES = ('{asker} asked: "{question}" {other} {said}', '"{question}" asked {asker}. {other} {said}')
_DIALOGUE_KINDS = ("fact", "fact", "arithmetic", "counting")


def _dialogue(rng: random.Random) -> str:
    """Dialogues in which people of Saltmere ask each other the questions that users ask the model."""

    def line(rng: random.Random) -> str:
        asker, other = rng.sample(PEOPLE, 2)
        (exchange,) = draw(rng, "train", rng.choice(_DIALOGUE_KINDS))
        if isinstance(exchange.answer, str):
            said = f'said: "{exchange.answer}"'
        else:
            code, output, text = (part["text"] for part in exchange.answer)
            said = f'wrote {code}, read {output} and said: "{text}"'
        template = rng.choice(_DIALOGUES)
        return template.format(asker=asker.name, other=other.name, question=exchange.question, said=said)

    return _repeat(rng, line, 1, 3)


_WRITERS: dict[str, Callable[[random.Random], str]] = {
    "portrait": _portrait,
    "comparison": _comparison,
    "story": _story,
    "ledger": _ledger,
    "echo": _echo,
    "spelling": _spelling,
    "code": _code,
    "sums": _sums,
    "dialogue": _dialogue,
}
