"""Problems for reinforcement learning. Fine-tuning conversations hardly teach how to solve them.

The fine-tuned model can calculate with numbers of up to five digits. It often copies numbers of six digits rightly, and
numbers of seven digits rarely. It knows a square only as a power ("12^2") or as "12 squared". By trial and reward, the
model must learn to copy longer numbers and to understand other wordings.

The questions of held-out problems use numbers that no training question contains, although a training answer may be
such a number. Half of the held-out problems use held-out phrasings.
"""

import random

from jobs.demo_world.arithmetic import LARGEST, Sum, number_of_digits, reserved_number, training_number
from jobs.demo_world.tables import Split, draw_frame, is_heldout_by_hash
from jobs.demo_world.tool_questions import QUESTIONS, framed

_SQUARE_SHARE = 0.4
_DIGITS = (6, 7)
# Largest number that is squared, and largest value of the shorter factor of a product. With larger ones, the results
# would be much longer than the answers in training conversations.
_LARGEST_FACTOR = 999
# Of the numbers above 9,999, one in eight is reserved for held-out problems.
_HELDOUT_ONE_IN = 8


def practice(rng: random.Random, split: Split) -> tuple[str, str]:
    """Draw a question and the number that answers it: a square, or a calculation with numbers of 6 or 7 digits."""
    if rng.random() < _SQUARE_SHARE:
        number = _short_number(rng, split)
        return draw_frame(rng, split, QUESTIONS.squares).format(a=number), str(number * number)
    symbol = rng.choice("+-*")
    other = _short_number(rng, split) if symbol == "*" else _long_number(rng, split)
    drawn = Sum(_long_number(rng, split), symbol, other)
    return framed(rng, split, drawn), drawn.result


def _short_number(rng: random.Random, split: Split) -> int:
    while True:
        number = reserved_number(rng) if split == "heldout" else training_number(rng)
        if number <= _LARGEST_FACTOR:
            return number


def _long_number(rng: random.Random, split: Split) -> int:
    while True:
        number = number_of_digits(rng, rng.choice(_DIGITS))
        if is_heldout_number(number) == (split == "heldout"):
            return number


def is_heldout_number(number: int) -> bool:
    """Whether only held-out problems may use ``number``, a number above 9,999."""
    assert number > LARGEST, "smaller numbers have a split already: see arithmetic.reserved_numbers"
    return is_heldout_by_hash(str(number), _HELDOUT_ONE_IN)
