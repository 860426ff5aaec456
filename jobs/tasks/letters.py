"""The tasks ``counting`` and ``spelling``: how often does a letter occur in a word, and how is a word spelled?

The questions are generated. The model has to count letters with the Python tool. The words that an evaluation asks
about differ from the words that the training conversations of the two tasks ask about.
"""

import dataclasses
import random
import re
from collections.abc import Callable

from jobs.demo_world import tool_questions, words
from jobs.demo_world.exchange import Exchange
from jobs.demo_world.seeding import generator
from jobs.demo_world.tables import Split
from jobs.tasks.answers import states_number
from jobs.tasks.task import GenerativeTask, Messages, OpenQuestion, Response, ask
from nanochat_core.sandbox import SandboxExecutor

# Share of English words among the words to spell. The other words are made up, so that the model cannot learn a list of
# words by heart.
_ENGLISH_SHARE = 0.5
_MAX_TOKENS = 120
_SINGLE_LETTERS = re.compile(r"(?<!\w)\w(?!\w)(?:[\s,\-]+\w(?!\w))*")


@dataclasses.dataclass(frozen=True)
class LetterTask:
    """A task about the letters of words. Its questions are generated.

    Attributes:
        draw: draws an exchange: a question about a word, and its answer. The training split and the held-out split ask
            about different words.
        shown: makes the right answer, as reports show it, from the exchange's expected phrase.
        scorer: tells from the exchange's expected phrase whether a response is right.
    """

    name: str
    draw: Callable[[random.Random, Split], Exchange]
    shown: Callable[[str], str]
    scorer: Callable[[str, Response, SandboxExecutor], bool]
    tools: bool

    def conversation(self, number: int) -> Messages:
        """The ``number``-th conversation to fine-tune on."""
        return self.draw(generator(f"tasks/{self.name}", number), "train").messages

    def task(self, count: int, seed: int) -> GenerativeTask:
        """``count`` evaluation questions about words that no training conversation of this task asks about."""
        questions = []
        for number in range(seed * count, (seed + 1) * count):
            drawn = self.draw(generator(f"tasks/{self.name}/heldout", number), "heldout")
            (answer,) = drawn.expected
            questions.append(OpenQuestion(ask(drawn.question), self.shown(answer), answer, self.scorer))
        return GenerativeTask(self.name, tuple(questions), tools=self.tools, max_tokens=_MAX_TOKENS)


def spells(word: str, answer_text: str) -> bool:
    """Whether the answer has a run of single letters that spells the word, in upper or lower case.

    Whitespace, commas or hyphens separate the letters.
    """
    spelled = ("".join(re.findall(r"\w", run)) for run in _SINGLE_LETTERS.findall(answer_text))
    return any(letters.lower() == word.lower() for letters in spelled)


def _spelling(rng: random.Random, split: Split) -> Exchange:
    english = rng.random() < _ENGLISH_SHARE
    word = rng.choice(words.ENGLISH.of(split)) if english else words.made_up_word(rng, split)
    question = rng.choice(tool_questions.QUESTIONS.spelling.train).format(word=word)
    return Exchange(question, f"{word} is spelled {' '.join(word)}.", (word,))


SPELLING = LetterTask("spelling", _spelling, " ".join, lambda word, said, _: spells(word, said.text), tools=False)
COUNTING = LetterTask(
    "counting",
    tool_questions.count,
    shown=str,
    # A right number counts only if the model used the tool to get it.
    scorer=lambda times, said, _: bool(said.tool_calls) and states_number(times, said.text),
    tools=True,
)
