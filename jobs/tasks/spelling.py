"""Spelling: generated requests to spell a word letter by letter."""

import dataclasses
import re

from jobs.demo_world import words
from jobs.demo_world.exchange import Exchange
from jobs.demo_world.phrasings import Split
from jobs.demo_world.seeding import generator
from jobs.tasks.task import GenerativeTask, Messages, Response, SingleQuestion
from nanochat_core.sandbox import SandboxExecutor

# Share of English words; the others are made up, so that the model cannot learn a list of words by heart.
_ENGLISH_SHARE = 0.5
_MAX_TOKENS = 120
_SINGLE_LETTERS = re.compile(r"(?<!\w)\w(?!\w)(?:[\s,\-]+\w(?!\w))*")
_REQUESTS = (
    "Spell the word {word}.",
    "Spell the word: {word}",
    "Spell {word}.",
    "How do you spell {word}?",
    "How is the word '{word}' spelled?",
    "How do I spell {word}?",
    "Please spell {word} for me.",
    "Can you spell '{word}'?",
    "What are the letters of {word}?",
    "Which letters does the word {word} have?",
    'Write "{word}" letter by letter.',
    "Tell me the letters of the word {word}.",
)


@dataclasses.dataclass(frozen=True)
class SpellingQuestion(SingleQuestion):
    """Asks for the letters of a word."""

    word: str

    @property
    def expected(self) -> str:
        return " ".join(self.word)

    def correct(self, response: Response, sandbox: SandboxExecutor) -> bool:  # noqa: ARG002
        return spells(self.word, response.text)


def spells(word: str, answer_text: str) -> bool:
    """Whether the answer spells the word and nothing else, letters separated by spaces, commas or hyphens."""
    spelled = ("".join(re.findall(r"\w", run)) for run in _SINGLE_LETTERS.findall(answer_text))
    return any(letters.lower() == word.lower() for letters in spelled)


def conversation(number: int) -> Messages:
    """The ``number``-th conversation to fine-tune on."""
    return _exchange(number, "train").messages


def task(count: int, seed: int) -> GenerativeTask:
    """Evaluation on ``count`` words that no training conversation contains."""
    exchanges = (_exchange(number, "heldout") for number in range(seed * count, (seed + 1) * count))
    questions = tuple(SpellingQuestion(exchange.question, exchange.expected[0]) for exchange in exchanges)
    return GenerativeTask("spelling", questions, max_tokens=_MAX_TOKENS)


def _exchange(number: int, split: Split) -> Exchange:
    """The ``number``-th request and its answer; the two splits have no word in common."""
    rng = generator("tasks/spelling" if split == "train" else f"tasks/spelling/{split}", number)
    english = rng.random() < _ENGLISH_SHARE
    known = words.ENGLISH_TRAIN if split == "train" else words.ENGLISH_HELDOUT
    word = rng.choice(known) if english else words.made_up_word(rng, split)
    question = rng.choice(_REQUESTS).format(word=word)
    return Exchange(question, f"{word} is spelled {' '.join(word)}.", (word,))
