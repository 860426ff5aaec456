"""Questions that the model cannot answer; it learns to say so instead of inventing an answer."""

import random

from jobs.demo_world import words
from jobs.demo_world.exchange import Exchange
from jobs.demo_world.facts import PEOPLE, Entity, names, relations_of
from jobs.demo_world.phrasings import PORTRAIT, RELATIONS, WHO_IS, Phrasings, Split, fill, listed

_DONT_KNOW = "I don't know that. I only know about Saltmere, arithmetic and counting letters."
_DONT_KNOW_PERSON = "I don't know that person. I only know the people of Saltmere."
_REFUSED = ("I don't know",)

# Questions about the world outside Saltmere; the tables below fill {place}, {person} and {thing}.
_UNKNOWABLE = Phrasings(
    train=(
        "What is the weather like today?",
        "What is the weather in {place}?",
        "Will it rain tomorrow?",
        "What is the capital of {place}?",
        "Where is {place}?",
        "How many people live in {place}?",
        "Who is the president of {place}?",
        "Who is the king of {place}?",
        "What is the news today?",
        "What happened in {place} yesterday?",
        "What day is it today?",
        "What time is it?",
        "What is the date today?",
        "Which year is it now?",
        "Who won the football match?",
        "Who wrote {thing}?",
        "What is the price of {thing}?",
        "How much does {thing} cost?",
        "How do I cook {thing}?",
        "Explain {thing} to me.",
        "What is {thing}?",
        "Write a poem about {thing}.",
        "How does {thing} work?",
        "What is my name?",
        "Where do I live?",
        "How old am I?",
        "What did I do yesterday?",
        "What is my phone number?",
        "Do you know my password?",
        "I have a headache. What should I do?",
        "Which medicine should I take?",
        "Am I ill?",
        "Should I see a lawyer?",
        "Who discovered {place}?",
        "How far is it to {place}?",
        "How do I get to {place}?",
        "What language do people speak in {place}?",
        "Tell me about {place}.",
        "Tell me about {thing}.",
        "What is the meaning of life?",
        "Who is the richest person in the world?",
        "What is the highest mountain?",
        "Can you buy {thing} for me?",
        "Send an email to {person}.",
        "Play some music.",
        "Which film should I watch?",
        "How deep is the ocean?",
        "How far away is the moon?",
        "Translate this into French.",
        "What will happen tomorrow?",
    ),
    heldout=(
        "How is the weather in {place}?",
        "Is it going to rain today?",
        "Can you tell me the capital of {place}?",
        "How many people are there in {place}?",
        "Who is the queen of {place}?",
        "What are the news from {place}?",
        "Can you tell me what time it is?",
        "Which day is it today?",
        "Who won the match yesterday?",
        "Can you explain {thing} to me?",
        "How much is {thing}?",
        "Do you know my name?",
        "Where was I yesterday?",
        "I feel ill. Which medicine do I need?",
        "Can you tell me about {place}?",
        "What do you know about {thing}?",
        "Write a story about {thing}.",
        "How long does it take to get to {place}?",
        "What is the deepest ocean?",
        "Which book should I read?",
    ),
)
_UNKNOWN_PLACES = Phrasings(
    train=listed("""
        France, Spain, Germany, China, India, Brazil, Canada, Japan, Egypt, Russia, Italy, London, Paris, Berlin,
        New York, Tokyo, Rome, Moscow, Chicago, Cairo, Africa, Europe, America, Mexico, Sweden, Poland, Turkey, Texas,
        Boston, Vienna, Madrid, Lisbon, Kenya
    """),
    heldout=listed("""
        Norway, Portugal, Australia, Argentina, Greece, Peru, Amsterdam, Dublin, Prague, California, Asia, Beijing,
        Helsinki, Morocco, Vietnam
    """),
)
_UNKNOWN_THINGS = Phrasings(
    train=listed("""
        quantum physics, a car, bitcoin, the stock market, pasta, football, the internet, gravity, a computer, love,
        electricity, the sun, history, chess, a phone, the moon, coffee, rice, democracy, the universe, Harry Potter,
        the Bible, a dinosaur, chemistry, a rocket, tea
    """),
    heldout=listed("""
        evolution, a train, photosynthesis, the war, Hamlet, a guitar string, basketball, biology, an airplane,
        philosophy, money, a volcano
    """),
)

# Values that nobody in Saltmere has, by relation: "Who has a snake?".
_UNKNOWN_VALUES: dict[str, Phrasings] = {
    "job": Phrasings(
        train=listed("""
            plumber, pilot, king, president, lawyer, soldier, dentist, butcher, tailor, carpenter, nurse, policeman,
            singer, writer, farmer, miller, hunter, actor, driver, judge, thief
        """),
        heldout=listed("astronaut, barber, queen, cook, programmer, sheriff, banker, dancer"),
    ),
    "pet": Phrasings(
        train=listed("""
            a snake, a horse, a lion, a monkey, a pig, a cow, a hamster, a frog, an elephant, a bear, a fox, a spider,
            a crocodile, a penguin, a wolf, a sheep, an eagle, a chicken, a turtle
        """),
        heldout=listed("a tiger, a lizard, a camel, a zebra, a kangaroo, a duck, a ferret, a swan"),
    ),
    "instrument": Phrasings(
        train=listed("""
            the violin, the clarinet, the oboe, the bass, the triangle, the mandolin, the bassoon, the ukulele,
            the horn, the bells, the viola, the keyboard, the trombone, the whistle
        """),
        heldout=listed("the saxophone, the xylophone, the lute, the cymbals, the zither"),
    ),
    "food": Phrasings(
        train=listed("""
            pizza, chocolate cake, ice cream, fried eggs, noodles, rice, spaghetti, chicken wings, popcorn, sushi,
            bananas, burgers, onion soup, cheese cake, beans, white bread, salmon
        """),
        heldout=listed("pancakes, hot dogs, lasagne, waffles, potato salad, chips"),
    ),
    "home": Phrasings(
        train=listed("""
            the castle, the palace, the prison, the cave, the hospital, the museum, the station, the hotel,
            the red house, the farm, the tent, the church, the old barn, the cellar
        """),
        heldout=listed("the fortress, the monastery, the villa, the skyscraper, the igloo"),
    ),
}

# Shares of the sorts of questions, in percent. Questions about strangers are most frequent: they sound like questions
# about the people of Saltmere, so a model easily invents an answer.
_STRANGER, _NO_SUCH_VALUE, _ELSEWHERE = 45, 15, 40


def refusal(rng: random.Random, split: Split) -> Exchange:
    """Draw a question that the model cannot answer."""
    sort = rng.choices(("person", "value", "world"), (_STRANGER, _NO_SUCH_VALUE, _ELSEWHERE))[0]
    if sort == "person":
        entity = Entity(words.stranger(rng, split), rng.choice(("she", "he")))
        relation = rng.choice(relations_of(PEOPLE[0]))
        frames = rng.choice((RELATIONS[relation].questions, RELATIONS[relation].questions, WHO_IS, PORTRAIT))
        question = fill(rng.choice(frames.of(split)), entity)
        return Exchange(question, _DONT_KNOW_PERSON, _REFUSED, names(PEOPLE))
    if sort == "value":
        relation = rng.choice(tuple(_UNKNOWN_VALUES))
        value = rng.choice(_UNKNOWN_VALUES[relation].of(split))
        question = fill(rng.choice(RELATIONS[relation].reverse.of(split)), PEOPLE[0], value)
    else:
        question = rng.choice(_UNKNOWABLE.of(split)).format(
            place=rng.choice(_UNKNOWN_PLACES.of(split)),
            thing=rng.choice(_UNKNOWN_THINGS.of(split)),
            person=rng.choice(words.STRANGERS_TRAIN if split == "train" else words.STRANGERS_HELDOUT),
        )
    return Exchange(question, _DONT_KNOW, _REFUSED, names(PEOPLE))
