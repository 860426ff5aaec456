"""Items of CORE as tokens: the examples before each, and which tokens of which option are scored."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence

from jobs.measures.core.bundle import Kind, Task
from nanochat_core.tokenizer import SPLIT_PATTERN, Tokenizer

BETWEEN = "\n\n"
# Item ``number`` is shown examples that this plus its number draws.
_EXAMPLES_SEED = 1234


@dataclasses.dataclass(frozen=True)
class Option:
    """One text that is scored: its tokens, of which those from ``start`` to the end are to be predicted."""

    ids: list[int]
    start: int


@dataclasses.dataclass(frozen=True)
class Question:
    """One item of a task, ready to be scored.

    Attributes:
        number: which item of the task.
        options: the texts to choose from; of ``language_modeling`` only one.
        gold: which is right.
    """

    number: int
    kind: Kind
    options: tuple[Option, ...]
    gold: int

    @property
    def size(self) -> int:
        """Tokens of the longest option, about what it costs to score them all."""
        return max(len(option.ids) for option in self.options)


class Prompts:
    """Asks the items of a task as ``tokenizer``'s tokens.

    Examples recur, each before as many items as there are shots, and options share all of theirs. Each is tokenized
    once where a token cannot reach from one into the next.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, longest: int) -> None:
        """
        Args:
            longest: tokens that the model can read; of longer texts the last ones are kept.
        """
        self._task, self._tokenizer, self._longest = task, tokenizer, longest
        # No match of this pattern goes on behind a line's end, whatever follows that is not whitespace.
        self._separable = tokenizer.pattern == SPLIT_PATTERN
        self._shown: dict[int, list[int]] = {}

    def ask(self, number: int) -> Question:
        """Item ``number`` behind its examples."""
        item, kind = self._task.items[number], self._task.kind
        examples = draw_examples(number, len(self._task.items), self._task.shots)
        if kind == "language_modeling":
            without, whole = item.asked
            # A space at the end belongs to the token that comes next.
            ids = [self._encode(examples, without, strip=True), self._encode(examples, whole)]
            options = [Option(ids[1], common_length(ids))]
        elif kind == "schema":
            ids = [self._encode(examples, text) for text in item.asked]
            counted = common_length([each[::-1] for each in ids])
            options = [Option(each, len(each) - counted) for each in ids]
        else:
            ids = [self._encode(examples, text) for text in item.asked]
            options = [Option(each, common_length(ids)) for each in ids]
        return Question(number, kind, tuple(self._cropped(option) for option in options), item.gold)

    def _encode(self, examples: Sequence[int], text: str, *, strip: bool = False) -> list[int]:
        """BOS and the tokens of the examples and the text, as if all of it were tokenized at once."""
        bos = self._tokenizer.bos_id
        shown = [self._task.items[example].shown + BETWEEN for example in examples]
        if not self._separable or any(not each[:1].strip() for each in (*shown, text)):
            whole = "".join((*shown, text))
            return [bos, *self._tokenizer.encode(whole.strip() if strip else whole)]
        known = (self._example(example, each) for example, each in zip(examples, shown, strict=True))
        return [bos, *itertools.chain.from_iterable(known), *self._tokenizer.encode(text.rstrip() if strip else text)]

    def _example(self, number: int, text: str) -> list[int]:
        if number not in self._shown:
            self._shown[number] = self._tokenizer.encode(text)
        return self._shown[number]

    def _cropped(self, option: Option) -> Option:
        surplus = len(option.ids) - self._longest
        if surplus <= 0:
            return option
        return Option(option.ids[surplus:], max(option.start - surplus, 0))


def draw_examples(number: int, items: int, shots: int) -> list[int]:
    """The items that are shown before item ``number`` of ``items``, in order."""
    # As drawn from a list of the others, which need not be made for it.
    drawn = random.Random(_EXAMPLES_SEED + number).sample(range(items - 1), shots)  # noqa: S311
    return [other if other < number else other + 1 for other in drawn]


def common_length(sequences: Sequence[list[int]]) -> int:
    """How many first elements all sequences have in common."""
    # What the first and the last in order share, those between share too.
    first, last = min(sequences), max(sequences)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
