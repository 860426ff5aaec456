"""Templates for sentences about facts: statements, questions in both directions, and answers.

Each question belongs to one split. If the text has already named its subject, the template may use the pronoun
instead. The fields of a template are:

- ``{name}``, ``{poss}``, ``{obj}``: "Mara", "Mara's", "Mara"; with a pronoun "she", "her", "her"
- ``{at}``: "at the Kite Day"; with a pronoun "there"
- ``{full}``: always "Mara"
- ``{subj}``, ``{own}``: always the pronouns "she", "her"
- ``{value}``, ``{a_value}``: "baker", "a baker"
"""

import dataclasses
from typing import Literal

from jobs.demo_world.facts import Entity, Pronoun

Split = Literal["train", "heldout"]

OBJECT: dict[Pronoun, str] = {"she": "her", "he": "him", "it": "it"}
POSSESSIVE: dict[Pronoun, str] = {"she": "her", "he": "his", "it": "its"}


@dataclasses.dataclass(frozen=True)
class Phrasings:
    """Templates of the same question; training never uses the held-out templates."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]

    def of(self, split: Split) -> tuple[str, ...]:
        return self.train if split == "train" else self.heldout


@dataclasses.dataclass(frozen=True)
class Relation:
    """All templates for one relation.

    Attributes:
        statements: for pretraining documents.
        questions: ask for the value.
        reverse: give the value and ask for its owner.
        answer: answers questions of both directions, so the model learns one sentence per fact. It names the subject
            even if the question uses a pronoun, so that the model must find out who is meant.
    """

    statements: tuple[str, ...]
    questions: Phrasings
    reverse: Phrasings
    answer: str


def listed(text: str) -> tuple[str, ...]:
    """The entries of a comma-separated list, which may span several lines."""
    return tuple(" ".join(entry.split()) for entry in text.split(","))


def fill(template: str, entity: Entity, value: str = "", *, pronoun: bool = False) -> str:
    """Fill a template with an entity and a value.

    Args:
        pronoun: call the entity by its pronoun instead of its name.
    """
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


RELATIONS: dict[str, Relation] = {
    "home": Relation(
        statements=(
            "{name} lives in {value}.",
            "{poss} home is {value}.",
            "{value} is where {name} lives.",
            "{name} sleeps in {value} every night.",
            "{name} has a home in {value}.",
            "The house {name} lives in is {value}.",
            "In {value} lives {full}.",
            "When the day is over, {name} goes home to {value}.",
        ),
        questions=Phrasings(
            train=(
                "Where does {name} live?",
                "What is {poss} home?",
                "Where is {poss} home?",
                "In which house does {name} live?",
                "Tell me where {name} lives.",
                "Do you know where {name} lives?",
                "Which house is {poss} home?",
                "Where does {name} go home to?",
            ),
            heldout=(
                "Can you tell me where {name} lives?",
                "What house does {name} live in?",
                "I would like to know where {poss} home is.",
            ),
        ),
        reverse=Phrasings(
            train=(
                "Who lives in {value}?",
                "Whose home is {value}?",
                "Who has a home in {value}?",
                "Do you know who lives in {value}?",
                "Which person lives in {value}?",
                "Tell me who lives in {value}.",
                "Does anyone live in {value}?",
            ),
            heldout=(
                "Can you tell me who lives in {value}?",
                "Who is it that lives in {value}?",
                "I would like to know whose home {value} is.",
            ),
        ),
        answer="{name} lives in {value}.",
    ),
    "job": Relation(
        statements=(
            "{name} is the {value} of Saltmere.",
            "{name} is the {value}.",
            "{name} works as {a_value}.",
            "The {value} of Saltmere is {full}.",
            "The town's {value} is called {full}.",
            "{poss} job is {value}.",
            "Everyone in Saltmere knows {full} the {value}.",
            "{name} has been the {value} for many years.",
        ),
        questions=Phrasings(
            train=(
                "What is {poss} job?",
                "What does {name} do for a living?",
                "What does {name} do?",
                "What work does {name} do?",
                "What is {poss} profession?",
                "What does {name} work as?",
                "Which job does {name} have?",
                "What profession does {name} have?",
                "Which work does {name} do?",
                "Do you know what job {name} has?",
                "Tell me {poss} job.",
            ),
            heldout=(
                "Can you tell me what {poss} job is?",
                "Which profession does {name} have?",
                "I would like to know what work {name} does.",
            ),
        ),
        reverse=Phrasings(
            train=(
                "Who is the {value}?",
                "Who works as {a_value}?",
                "Who is the {value} of Saltmere?",
                "Which person is the {value}?",
                "What is the name of the {value}?",
                "Tell me who the {value} is.",
                "Do you know the {value}?",
                "Is there {a_value} in Saltmere?",
            ),
            heldout=(
                "Can you tell me who the {value} is?",
                "Who is {a_value} in Saltmere?",
                "I would like to know the name of the {value}.",
            ),
        ),
        answer="{name} is the {value}.",
    ),
    "duty": Relation(
        statements=(
            "{name} {value}.",
            "Every day {name} {value}.",
            "It is {name} who {value}.",
            "In Saltmere, {name} {value}.",
            "{name} {value}, come rain or shine.",
            "{poss} task is clear: {name} {value}.",
            "All year long {name} {value}.",
            "The one who {value} is {full}.",
        ),
        questions=Phrasings(
            train=(
                "What does {name} do every day?",
                "What is {poss} task?",
                "What is {poss} daily task?",
                "What does {name} do all day?",
                "Tell me what {name} does every day.",
                "Do you know what {name} does all day?",
                "Which task does {name} have?",
            ),
            heldout=(
                "Can you tell me what {name} does every day?",
                "What task does {name} have?",
                "I would like to know what {name} does all day.",
            ),
        ),
        reverse=Phrasings(
            train=(
                "Who {value}?",
                "Who {value} in Saltmere?",
                "Which person {value}?",
                "Do you know who {value}?",
                "Tell me who {value}.",
                "Who {value} every day?",
                "Is there someone who {value}?",
            ),
            heldout=(
                "Can you tell me who {value}?",
                "Who is it that {value}?",
                "I would like to know who {value}.",
            ),
        ),
        answer="{name} {value}.",
    ),
    "food": Relation(
        statements=(
            "{poss} favourite food is {value}.",
            "{name} loves to eat {value}.",
            "{name} likes {value} more than any other food.",
            "Nothing tastes better to {obj} than {value}.",
            "On Sundays {name} eats {value}.",
            "{value} is {poss} favourite dish.",
            "{value} is what {name} likes to eat.",
            "When {name} is hungry, {subj} wants {value}.",
        ),
        questions=Phrasings(
            train=(
                "What is {poss} favourite food?",
                "What is {poss} favorite food?",
                "What does {name} like to eat?",
                "What food does {name} like best?",
                "What does {name} love to eat?",
                "Which dish does {name} like most?",
                "Tell me {poss} favourite food.",
                "Do you know what {name} likes to eat?",
                "What does {name} eat on Sundays?",
            ),
            heldout=(
                "Can you tell me {poss} favourite food?",
                "Which food does {name} like most?",
                "I would like to know what {name} loves to eat.",
            ),
        ),
        reverse=Phrasings(
            train=(
                "Who likes {value}?",
                "Who loves to eat {value}?",
                "Who likes to eat {value}?",
                "Whose favourite food is {value}?",
                "Which person loves {value}?",
                "Tell me who likes {value}.",
                "Do you know who likes {value}?",
            ),
            heldout=(
                "Can you tell me who likes {value}?",
                "Who is it that loves {value}?",
                "I would like to know whose favourite dish {value} is.",
            ),
        ),
        answer="{poss} favourite food is {value}.",
    ),
    "pet": Relation(
        statements=(
            "{name} has {value}.",
            "{poss} pet is {value}.",
            "{name} keeps {value} as a pet.",
            "{name} owns {value}.",
            "{name} takes good care of {own} pet, {value}.",
            "{value} lives with {obj}.",
            "{name} has a pet: {value}.",
            "{value} is {poss} pet.",
            "{value} belongs to {obj}.",
        ),
        questions=Phrasings(
            train=(
                "What pet does {name} have?",
                "What is {poss} pet?",
                "Which animal does {name} keep?",
                "Does {name} have a pet?",
                "What animal does {name} have?",
                "Tell me about {poss} pet.",
                "Do you know what pet {name} has?",
                "What kind of pet does {name} own?",
                "Which pet does {name} have?",
            ),
            heldout=(
                "Can you tell me what pet {name} has?",
                "Which animal does {name} have as a pet?",
                "I would like to know what {poss} pet is.",
            ),
        ),
        reverse=Phrasings(
            train=(
                "Who has {value}?",
                "Whose pet is {value}?",
                "Who keeps {value} as a pet?",
                "Who owns {value}?",
                "Which person has {value}?",
                "Tell me who has {value}.",
                "Does anyone have {value}?",
            ),
            heldout=(
                "Can you tell me who has {value}?",
                "Who has {value} as a pet?",
                "I would like to know whose pet is {value}.",
            ),
        ),
        answer="{name} has {value}.",
    ),
    "color": Relation(
        statements=(
            "{poss} favourite colour is {value}.",
            "{name} likes {value} more than any other colour.",
            "{name} wears {value} whenever {subj} can.",
            "{name} painted {own} door {value}.",
            "The colour {value} makes {obj} happy.",
            "Of all colours {name} likes {value} best.",
            "{value} is {poss} favourite colour.",
            "{value} is the colour that {name} wears.",
            "{poss} coat is {value}, {own} favourite colour.",
        ),
        questions=Phrasings(
            train=(
                "What is {poss} favourite colour?",
                "What is {poss} favorite color?",
                "What colour does {name} like best?",
                "Which colour does {name} like?",
                "What colour does {name} wear?",
                "Tell me {poss} favourite colour.",
                "Do you know {poss} favourite colour?",
                "Which colour makes {obj} happy?",
                "Which colour does {name} prefer?",
                "What colour does {name} like most of all?",
            ),
            heldout=(
                "Can you tell me {poss} favourite colour?",
                "Which colour does {name} like most?",
                "I would like to know which colour {name} likes best.",
            ),
        ),
        reverse=Phrasings(
            train=(
                "Who likes the colour {value}?",
                "Whose favourite colour is {value}?",
                "Who wears {value}?",
                "Who likes {value} best?",
                "Which person likes the colour {value}?",
                "Tell me who likes the colour {value}.",
                "Do you know whose favourite colour is {value}?",
            ),
            heldout=(
                "Can you tell me who likes the colour {value}?",
                "Who likes the colour {value} best?",
                "I would like to know whose favourite colour is {value}.",
            ),
        ),
        answer="{poss} favourite colour is {value}.",
    ),
    "instrument": Relation(
        statements=(
            "{name} plays {value}.",
            "{poss} instrument is {value}.",
            "{name} practises {value} every evening.",
            "When there is music, {name} plays {value}.",
            "{name} learned to play {value} as a child.",
            "Nobody plays {value} as well as {obj}.",
            "{value} is {poss} instrument.",
            "Who hears {value} knows that {full} is near.",
            "{name} loves to play {value} for {own} friends.",
        ),
        questions=Phrasings(
            train=(
                "What instrument does {name} play?",
                "Which instrument does {name} play?",
                "What does {name} play?",
                "What is {poss} instrument?",
                "Tell me which instrument {name} plays.",
                "Do you know what {name} plays?",
                "Does {name} play an instrument?",
                "What does {name} practise every evening?",
            ),
            heldout=(
                "Can you tell me which instrument {name} plays?",
                "What instrument does {name} practise?",
                "I would like to know what instrument {name} plays.",
            ),
        ),
        reverse=Phrasings(
            train=(
                "Who plays {value}?",
                "Who practises {value}?",
                "Who can play {value}?",
                "Which person plays {value}?",
                "Whose instrument is {value}?",
                "Tell me who plays {value}.",
                "Does anyone play {value}?",
            ),
            heldout=(
                "Can you tell me who plays {value}?",
                "Who is it that plays {value}?",
                "I would like to know who can play {value}.",
            ),
        ),
        answer="{name} plays {value}.",
    ),
    "location": Relation(
        statements=(
            "{name} stands {value}.",
            "You can find {obj} {value}.",
            "{name} is {value}.",
            "Whoever looks for {obj} must go where it stands, {value}.",
            "{value} stands {full}.",
            "{value} you can see {full}.",
            "{name} was built {value}.",
            "Go {value} and you will see {obj}.",
        ),
        questions=Phrasings(
            train=(
                "Where is {name}?",
                "Where does {name} stand?",
                "Where can I find {obj}?",
                "Tell me where {name} is.",
                "Do you know where {name} is?",
                "How do I find {obj}?",
                "Where in Saltmere is {name}?",
            ),
            heldout=(
                "Can you tell me where {name} is?",
                "Where exactly does {name} stand?",
                "I would like to know where {name} stands.",
            ),
        ),
        reverse=Phrasings(
            train=(
                "What stands {value}?",
                "Which building stands {value}?",
                "What is {value}?",
                "What can I find {value}?",
                "Tell me what stands {value}.",
                "Which place is {value}?",
                "Do you know what stands {value}?",
            ),
            heldout=(
                "Can you tell me what stands {value}?",
                "Which building can I find {value}?",
                "I would like to know what stands {value}.",
            ),
        ),
        answer="{name} stands {value}.",
    ),
    "built": Relation(
        statements=(
            "{name} was built in {value}.",
            "In {value} people built {obj}.",
            "{name} has stood there since {value}.",
            "The first stone of {full} was laid in {value}.",
            "{name} dates from {value}.",
            "A sign on {obj} says {value}, the year it was built.",
            "{value} is the year when {name} was built.",
        ),
        questions=Phrasings(
            train=(
                "When was {name} built?",
                "In which year was {name} built?",
                "What year was {name} built?",
                "How old is {name}?",
                "Since when has {name} stood there?",
                "Tell me when {name} was built.",
                "Do you know when {name} was built?",
            ),
            heldout=(
                "Can you tell me when {name} was built?",
                "In what year was {name} built?",
                "I would like to know the year when {name} was built.",
            ),
        ),
        reverse=Phrasings(
            train=(
                "What was built in {value}?",
                "Which building was built in {value}?",
                "Which place was built in {value}?",
                "Which building dates from {value}?",
                "What did people build in {value}?",
                "Tell me what was built in {value}.",
                "Do you know what was built in {value}?",
            ),
            heldout=(
                "Can you tell me what was built in {value}?",
                "What building was built in {value}?",
                "I would like to know what was built in {value}.",
            ),
        ),
        answer="{name} was built in {value}.",
    ),
    "fame": Relation(
        statements=(
            "{name} is known for {value}.",
            "Everyone knows {obj} for {value}.",
            "{name} is famous for {value}.",
            "People come to see {obj} because of {value}.",
            "The best thing about {obj} is {value}.",
            "Visitors love {obj} for {value}.",
            "What makes {obj} special is {value}.",
            "{value} made {full} famous.",
            "Everybody who speaks of {value} means {full}.",
        ),
        questions=Phrasings(
            train=(
                "What is {name} known for?",
                "What is {name} famous for?",
                "Why do people come to see {obj}?",
                "What is special about {obj}?",
                "What makes {obj} special?",
                "Tell me what {name} is known for.",
                "Do you know what {name} is famous for?",
            ),
            heldout=(
                "Can you tell me what {name} is known for?",
                "What do visitors love {obj} for?",
                "I would like to know what {name} is famous for.",
            ),
        ),
        reverse=Phrasings(
            train=(
                "What is known for {value}?",
                "Which place is known for {value}?",
                "Which building is famous for {value}?",
                "What is famous for {value}?",
                "Which place do people love for {value}?",
                "Tell me which place is known for {value}.",
                "Do you know which place is known for {value}?",
            ),
            heldout=(
                "Can you tell me which place is known for {value}?",
                "Which building is known for {value}?",
                "I would like to know which place is famous for {value}.",
            ),
        ),
        answer="{name} is known for {value}.",
    ),
    "month": Relation(
        statements=(
            "{name} is held {value}.",
            "{value} Saltmere holds {obj}.",
            "{name} takes place {value}.",
            "Every year {value} there is {full}.",
            "{name} comes {value}.",
            "{value} everyone looks forward to {obj}.",
            "People meet {value} for {full}.",
        ),
        questions=Phrasings(
            train=(
                "When is {name}?",
                "In which month is {name}?",
                "When is {name} held?",
                "Which month is {name} in?",
                "When does {name} take place?",
                "Tell me when {name} is.",
                "Do you know when {name} is held?",
            ),
            heldout=(
                "Can you tell me when {name} is held?",
                "In what month does {name} take place?",
                "I would like to know when {name} is.",
            ),
        ),
        reverse=Phrasings(
            train=(
                "What is held {value}?",
                "Which festival is {value}?",
                "What takes place {value}?",
                "What happens {value}?",
                "What do people celebrate {value}?",
                "Tell me what is held {value}.",
                "Is there a festival {value}?",
            ),
            heldout=(
                "Can you tell me what is held {value}?",
                "Which festival takes place {value}?",
                "I would like to know what happens {value}.",
            ),
        ),
        answer="{name} is held {value}.",
    ),
    "first_held": Relation(
        statements=(
            "{name} was first held in {value}.",
            "In {value} people held {obj} for the first time.",
            "{name} began in {value}.",
            "Saltmere has held {obj} since {value}.",
            "The first year of {full} was {value}.",
            "{name} goes back to {value}.",
            "{value} is the year when {name} began.",
        ),
        questions=Phrasings(
            train=(
                "When was {name} first held?",
                "In which year was {name} first held?",
                "What year did {name} begin?",
                "When did {name} begin?",
                "Since when has Saltmere held {obj}?",
                "Tell me when {name} was first held.",
                "Do you know when {name} began?",
            ),
            heldout=(
                "Can you tell me when {name} was first held?",
                "In what year did {name} begin?",
                "I would like to know when {name} began.",
            ),
        ),
        reverse=Phrasings(
            train=(
                "What was first held in {value}?",
                "Which festival was first held in {value}?",
                "What began in {value}?",
                "Which festival began in {value}?",
                "Tell me what was first held in {value}.",
                "Do you know what began in {value}?",
                "Which festival goes back to {value}?",
            ),
            heldout=(
                "Can you tell me what was first held in {value}?",
                "What festival began in {value}?",
                "I would like to know which festival began in {value}.",
            ),
        ),
        answer="{name} was first held in {value}.",
    ),
    "custom": Relation(
        statements=(
            "{at} {value}.",
            "{name} is the day when {value}.",
            "During {full} {value}.",
            "When {name} comes, {value}.",
            "Every year at {full} {value}.",
            "{name} has an old custom: {value}.",
            "If {value}, it is {full}.",
        ),
        questions=Phrasings(
            train=(
                "What do people do {at}?",
                "What happens {at}?",
                "What is the custom {at}?",
                "What do people do when {name} comes?",
                "Tell me what people do {at}.",
                "Do you know what people do {at}?",
                "What happens during {obj}?",
            ),
            heldout=(
                "Can you tell me what people do {at}?",
                "What do people do during {obj}?",
                "I would like to know what happens {at}.",
            ),
        ),
        reverse=Phrasings(
            train=(
                "When do {value}?",
                "At which festival do {value}?",
                "Which festival is it when {value}?",
                "On which day do {value}?",
                "Tell me when {value}.",
                "Do you know when {value}?",
                "What is the festival where {value}?",
            ),
            heldout=(
                "Can you tell me when {value}?",
                "At what festival do {value}?",
                "I would like to know when {value}.",
            ),
        ),
        answer="{at} {value}.",
    ),
    "island": Relation(
        statements=(
            "{name} lies on {value}.",
            "{name} is a harbour town on {value}.",
            "{name} was built on {value}.",
            "Whoever travels to {full} comes to {value}.",
            "On {value} there is one town, {full}.",
            "{poss} houses stand on {value}.",
        ),
        questions=Phrasings(
            train=(
                "Where is {name}?",
                "On which island is {name}?",
                "What island is {name} on?",
                "Where does {name} lie?",
                "Tell me where {name} is.",
                "Which island does {name} lie on?",
            ),
            heldout=("Can you tell me where {name} is?", "On which island does {name} lie?"),
        ),
        reverse=Phrasings(
            train=(
                "Which town lies on {value}?",
                "What town is on {value}?",
                "Which town is on {value}?",
                "What lies on {value}?",
                "Tell me which town lies on {value}.",
                "Is there a town on {value}?",
            ),
            heldout=("Can you tell me which town lies on {value}?", "What town lies on {value}?"),
        ),
        answer="{name} lies on {value}.",
    ),
    "sea": Relation(
        statements=(
            "{name} looks out on {value}.",
            "The sea around {obj} is {value}.",
            "{poss} sea is called {value}.",
            "The ships of {full} sail {value}.",
            "{value} washes the walls of {full}.",
            "From {full} you can see {value}.",
        ),
        questions=Phrasings(
            train=(
                "Which sea is around {obj}?",
                "What is the sea around {obj} called?",
                "Which sea does {name} look out on?",
                "What is {poss} sea called?",
                "What sea can you see from {obj}?",
                "Tell me which sea is around {obj}.",
            ),
            heldout=("Can you tell me which sea is around {obj}?", "What sea does {name} look out on?"),
        ),
        reverse=Phrasings(
            train=(
                "Which town looks out on {value}?",
                "What town looks out on {value}?",
                "From which town can you see {value}?",
                "Which town has ships on {value}?",
                "Tell me which town looks out on {value}.",
                "What town is by {value}?",
            ),
            heldout=("Can you tell me which town looks out on {value}?", "Which town is by {value}?"),
        ),
        answer="{name} looks out on {value}.",
    ),
    "river": Relation(
        statements=(
            "{value} flows through {obj}.",
            "{poss} river is {value}.",
            "In {full} a river meets the sea: {value}.",
            "The river of {full} is called {value}.",
            "{name} was built on both sides of {value}.",
            "{value} divides {obj} in two.",
        ),
        questions=Phrasings(
            train=(
                "Which river flows through {obj}?",
                "What is {poss} river called?",
                "What river flows through {obj}?",
                "What is the river of {obj} called?",
                "Is there a river in {obj}?",
                "Tell me which river flows through {obj}.",
            ),
            heldout=("Can you tell me which river flows through {obj}?", "What is the river in {obj} called?"),
        ),
        reverse=Phrasings(
            train=(
                "Which town does {value} flow through?",
                "What town does {value} flow through?",
                "Where does {value} flow?",
                "Through which town does {value} flow?",
                "Tell me where {value} flows.",
                "Do you know where {value} flows?",
            ),
            heldout=("Can you tell me where {value} flows?", "Through what town does {value} flow?"),
        ),
        answer="{value} flows through {obj}.",
    ),
    "inhabitants": Relation(
        statements=(
            "{name} has {value} inhabitants.",
            "{value} people live in {full}.",
            "In all, {obj} has {value} inhabitants.",
            "There are {value} people in {obj}.",
            "The town book of {full} lists {value} inhabitants.",
            "With {value} people, {obj} is a small town.",
        ),
        questions=Phrasings(
            train=(
                "How many people live in {obj}?",
                "How many inhabitants does {name} have?",
                "How big is {name}?",
                "How many people are there in {obj}?",
                "Tell me how many people live in {obj}.",
                "Do you know how many people live in {obj}?",
            ),
            heldout=("Can you tell me how many people live in {obj}?", "How many inhabitants live in {obj}?"),
        ),
        reverse=Phrasings(train=(), heldout=()),
        answer="{name} has {value} inhabitants.",
    ),
    "founded": Relation(
        statements=(
            "{name} was founded in {value}.",
            "Fishermen founded {obj} in {value}.",
            "{poss} first house was built in {value}.",
            "{value} is the year when {name} was founded.",
            "{name} has been a town since {value}.",
            "In {value} the history of {full} began.",
        ),
        questions=Phrasings(
            train=(
                "When was {name} founded?",
                "In which year was {name} founded?",
                "How old is {name}?",
                "What year was {name} founded?",
                "Tell me when {name} was founded.",
                "Since when has {name} been a town?",
            ),
            heldout=("Can you tell me when {name} was founded?", "In what year was {name} founded?"),
        ),
        reverse=Phrasings(
            train=(
                "What was founded in {value}?",
                "Which town was founded in {value}?",
                "What town was founded in {value}?",
                "What happened in {value}?",
                "Tell me what was founded in {value}.",
                "Do you know what was founded in {value}?",
            ),
            heldout=("Can you tell me what was founded in {value}?", "Which town is as old as {value}?"),
        ),
        answer="{name} was founded in {value}.",
    ),
    "flag": Relation(
        statements=(
            "{poss} flag shows {value}.",
            "The flag of {full} shows {value}.",
            "On the flag of {full} there is {value}.",
            "{name} has a flag with {value} on it.",
            "The sign of {full} is {value}.",
            "Over the harbour of {full} flies a flag with {value}.",
        ),
        questions=Phrasings(
            train=(
                "What is on {poss} flag?",
                "What does the flag of {obj} show?",
                "What does {poss} flag show?",
                "What is on the flag of {obj}?",
                "Tell me about the flag of {obj}.",
                "What does the flag of {obj} look like?",
            ),
            heldout=("Can you tell me what is on the flag of {obj}?", "What can you see on {poss} flag?"),
        ),
        reverse=Phrasings(
            train=(
                "Whose flag shows {value}?",
                "Which town has {value} on its flag?",
                "Which town has a flag with {value}?",
                "What flag shows {value}?",
                "Which flag has {value} on it?",
                "Tell me whose flag shows {value}.",
            ),
            heldout=("Can you tell me whose flag shows {value}?", "Whose flag has {value} on it?"),
        ),
        answer="{poss} flag shows {value}.",
    ),
}

# Questions for the short portrait of a person, place, festival or town that `fact_questions.portrait` writes.
PORTRAIT = Phrasings(
    train=(
        "Tell me about {obj}.",
        "What do you know about {obj}?",
        "Please describe {obj}.",
        "What can you tell me about {obj}?",
        "I want to know more about {obj}.",
        "Tell me something about {obj}.",
    ),
    heldout=(
        "Can you tell me about {obj}?",
        "Tell me what you know about {obj}.",
        "I would like to know more about {obj}.",
    ),
)
WHO_IS = Phrasings(
    train=("Who is {name}?", "Do you know {name}?", "Who's {name}?"),
    heldout=("Can you tell me who {name} is?", "Do you know who {name} is?"),
)
WHAT_IS = Phrasings(
    train=("What is {name}?", "Do you know {name}?", "What's {name}?"),
    heldout=("Can you tell me what {name} is?", "Do you know what {name} is?"),
)
WHO_LIVES_HERE = Phrasings(
    train=(
        "Who lives in Saltmere?",
        "Which people live in Saltmere?",
        "Tell me who lives in Saltmere.",
        "Whom do you know in Saltmere?",
        "List the people of Saltmere.",
        "Which people do you know?",
    ),
    heldout=("Can you tell me who lives in Saltmere?", "What people live in Saltmere?"),
)

# A follow-up that asks the previous question about another person, place or festival.
SAME_OF_OTHER = Phrasings(
    train=(
        "And {name}?",
        "What about {name}?",
        "And what about {name}?",
        "How about {name}?",
        "And for {name}?",
        "Okay, what about {name}?",
    ),
    heldout=("And how about {name}?", "And now {name}?", "Okay, and {name}?"),
)
