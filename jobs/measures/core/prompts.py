"""Turns items of CORE into tokens: few-shot examples, the options, and the tokens of each option that are scored."""

import dataclasses
import functools
import itertools
import random
from collections.abc import Sequence

from jobs.measures.core.bundle import Kind, Task
from nanochat_core.tokenizer import SPLIT_PATTERN, Tokenizer

BETWEEN = "\n\n"
# The seed of the examples before an item is this number plus the item's number.
_EXAMPLES_SEED = 1234


@dataclasses.dataclass(frozen=True)
class Option:
    """The tokens of one text. The tokens from index ``start`` to the end are scored."""

    ids: list[int]
    start: int


@dataclasses.dataclass(frozen=True)
class Question:
    """One item of a task, ready to be scored.

    Attributes:
        number: number of the item in its task.
        options: the texts to choose from; ``language_modeling`` has one.
        gold: index of the right option.
    """

    number: int
    kind: Kind
    options: tuple[Option, ...]
    gold: int

    @property
    def size(self) -> int:
        """The number of tokens of the longest option. It serves as an estimate of the cost of scoring all options."""
        return max(len(option.ids) for option in self.options)


class Prompts:
    """Makes the questions of a task's items. A text of more than ``longest`` tokens is cut at its start.

    An example occurs in the prompts of several items. If no token can span two examples, each example is tokenized
    only once.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, longest: int) -> None:
        self._task, self._tokenizer, self._longest = task, tokenizer, longest
        # With SPLIT_PATTERN, a token can span the end of an example only if whitespace follows the example. Without
        # such whitespace, the examples can therefore be tokenized separately.
        self._separable = tokenizer.pattern == SPLIT_PATTERN
        self._example = functools.cache(lambda number: tokenizer.encode(task.items[number].shown + BETWEEN))

    def ask(self, number: int) -> Question:
        """The question of item ``number``, with its examples in front."""
        item, kind = self._task.items[number], self._task.kind
        examples = draw_examples(number, len(self._task.items), self._task.shots)
        if kind == "language_modeling":
            without, whole = item.asked
            # A space at the end is stripped, because the next token usually begins with a space.
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
        """BOS, and the tokens that the tokenizer gives for the examples and the text as one joined text."""
        bos = self._tokenizer.bos_id
        shown = [self._task.items[example].shown + BETWEEN for example in examples]
        if not self._separable or any(not each[:1].strip() for each in (*shown, text)):
            whole = "".join((*shown, text))
            return [bos, *self._tokenizer.encode(whole.strip() if strip else whole)]
        known = itertools.chain.from_iterable(map(self._example, examples))
        return [bos, *known, *self._tokenizer.encode(text.rstrip() if strip else text)]

    def _cropped(self, option: Option) -> Option:
        surplus = max(len(option.ids) - self._longest, 0)
        return Option(option.ids[surplus:], max(option.start - surplus, 0))


def draw_examples(number: int, items: int, shots: int) -> list[int]:
    """The numbers of the ``shots`` examples before item ``number`` of a task that has ``items`` items."""
    # The draw is from the numbers of all items except ``number``. Numbers from ``number`` on are shifted by one
    # afterwards, so that the list of these items need not be built.
    drawn = random.Random(_EXAMPLES_SEED + number).sample(range(items - 1), shots)  # noqa: S311
    return [other if other < number else other + 1 for other in drawn]


def common_length(sequences: Sequence[list[int]]) -> int:
    """The length of the longest common prefix of all sequences."""
    # In sorted order, a prefix that the first and the last sequence share is a prefix of all sequences.
    first, last = min(sequences), max(sequences)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
