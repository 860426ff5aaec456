"""Questions about many subjects, for models whose fine-tuning conversations are not known."""

from __future__ import annotations

import itertools
import random

_ABOUT_PEOPLE = (
    "Where does {} live?",
    "What is {}'s job?",
    "How old is {}?",
    "Who is {}?",
    "What is {}'s dog called?",
    "What does {} like to eat?",
    "When was {} born?",
    "Who is {}'s sister?",
    "Where did {} go to school?",
    "Do you know {}?",
)
_ABOUT_PLACES = (
    "Who is the mayor of {}?",
    "What is {} famous for?",
    "How many people live in {}?",
    "Which river flows through {}?",
    "When was {} founded?",
    "How do I get to {}?",
)
# Pairs: wordings of questions, and the texts that take the place of {} in each wording. Semicolons separate the texts.
_SUBJECTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("What is the capital of {}?", "Where is {}?", "Which language do people speak in {}?", "Name a city in {}."),
        "France; Japan; Brazil; Egypt; Canada; Kenya; Norway; India; Peru; Poland; Turkey; Australia; Cuba; Vietnam",
    ),
    (
        ("Who was {}?", "When was {} born?", "What is {} known for?", "Where did {} live?"),
        "Marie Curie; Isaac Newton; Mozart; Cleopatra; Shakespeare; Ada Lovelace; Napoleon; Darwin; Galileo; Homer",
    ),
    (
        ("Who wrote {}?", "What is {} about?", "When was {} written?"),
        "Hamlet; the Odyssey; Moby Dick; Pride and Prejudice; Don Quixote; Frankenstein; War and Peace; Emma",
    ),
    (
        ("What is {}?", "Explain {} in one sentence.", "Explain {} to a child.", "Why is {} important?"),
        "gravity; photosynthesis; democracy; inflation; evolution; electricity; music; an atom; a computer; a poem; "
        "friendship; the moon; a river; a prime number; bread; sleep; climate; trade; a bridge; memory",
    ),
    (
        ("What does the word {} mean?", "What is the opposite of {}?", "Use the word {} in a sentence.", "Spell {}."),
        "brave; early; empty; gentle; heavy; honest; narrow; proud; quiet; rapid; simple; strange; warm; wise; young",
    ),
    (
        ("How do I {}?", "Give me a tip to {}.", "How long does it take to {}?"),
        "boil an egg; learn a language; sleep better; write a letter; grow tomatoes; save money; tie a knot; make tea; "
        "ride a bicycle; clean a window; bake bread; remember names",
    ),
    (
        ("Write a short poem about {}.", "Tell me a story about {}.", "Tell me a fact about {}.", "Do you like {}?"),
        "the sea; a cat; winter; a train; the sun; old books; a garden; rain; a dragon; coffee; the night; a friend",
    ),
    (
        ("What color is {}?", "How big is {}?", "Describe {}.", "Where can I find {}?"),
        "an elephant; a banana; the sky; snow; a rose; a whale; gold; grass; a lemon; a crow; the sun; a mouse",
    ),
    (
        ("Name three {}.", "What are {}?", "Which {} do you know?", "How many {} are there?"),
        "colors; animals; planets; fruits; countries; instruments; trees; oceans; sports; metals; months; continents",
    ),
    (
        _ABOUT_PEOPLE,
        "Thomas; Elena; Mister Brown; my neighbor; Priya; the mayor; Doctor Weber; Lucas; Fatima; the baker; Ingrid; "
        "your friend; Anton Berg; Sofia; the king; Yuki; Professor Lang; my boss; Carlos; the new teacher",
    ),
    (
        _ABOUT_PLACES,
        "London; Lyon; Kyoto; Boston; Cairo; Bremen; Lima; Graz; Porto; Leeds; Toledo; our town; the old village",
    ),
    (
        (
            "What is my {} called?",
            "What is my {}?",
            "What is the name of my {}?",
            "Who is my {}?",
            "Where is my {}?",
            "When is my {}?",
            "How old is my {}?",
            "What color is my {}?",
            "Do you know my {}?",
            "Tell me about my {}.",
            "Which {} do I have?",
            "Where did I get my {}?",
        ),
        "cat; dog; horse; bird; brother; sister; mother; father; uncle; grandmother; cousin; son; daughter; wife; "
        "husband; friend; neighbor; boss; teacher; doctor; dentist; lawyer; baker; house; flat; garden; street; town; "
        "country; school; job; car; bicycle; boat; phone; computer; coat; key; bed; wedding; birthday; holiday; "
        "meeting; exam; age; name; hobby; team; instrument; language; favorite song; favorite color; favorite dish; "
        "favorite book; favorite film; favorite sport; favorite season; favorite number",
    ),
    (
        ("Where do I {}?", "When do I {}?", "With whom do I {}?", "Why do I {}?", "How often do I {}?"),
        "work; live; sleep; swim; study; play; eat lunch; go on holiday; buy bread; meet my friends; park; train; sing",
    ),
    (
        ("What is your {}?", "Tell me your {}.", "Do you have a {}?", "Who gave you your {}?"),
        "name; age; favorite color; home; job; birthday; purpose; opinion; family; secret; maker; favorite book",
    ),
    (
        ("{}", "Please answer: {}"),
        "Who are you?; Who made you?; What can you do?; How are you?; Are you a person?; Hello!; Good morning.; "
        "Thank you.; Goodbye.; Can you help me?; What do you know?; Tell me a joke.; What time is it?; I am sad.; "
        "What happened today?; Do you dream?; Where are you?; Say something.; Is it true?; Why?",
    ),
)


def general_questions(rng: random.Random) -> list[str]:
    """All general questions, in random order."""
    made = [
        wording.format(subject)
        for wordings, subjects in _SUBJECTS
        for wording, subject in itertools.product(wordings, subjects.split("; "))
    ]
    return rng.sample(made, len(made))


def questions_about(name: str) -> list[str]:
    """Questions about a name that may be the name of a person or of a place."""
    return [wording.format(name) for wording in (*_ABOUT_PEOPLE, *_ABOUT_PLACES)]
