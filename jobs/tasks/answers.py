"""Compare the visible text of an answer with the expected number or phrase."""

import re
from decimal import Decimal

# Pattern of a number. Its sign may be before or after a dollar sign: -$5, $-5. A dot without a digit after it is a full
# stop and not part of the number.
_NUMBER = re.compile(r"(?<![\w.])(-?)\$?(-?)((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)(?!\w)")


def plain_number(match: re.Match[str]) -> str:
    """The number that ``match`` has found, without commas.

    The three groups of ``match`` are the sign before a dollar sign, the sign after the dollar sign, and the digits.
    """
    before, after, digits = match.groups()
    return ("-" if before or after else "") + digits.replace(",", "")


def last_number(text: str) -> str | None:
    """The last number of a text, without ``$`` and commas between thousands; None if there is no number."""
    match = None
    for match in _NUMBER.finditer(text):  # noqa: B007
        pass
    return plain_number(match) if match else None


def states_number(expected: str, answer_text: str) -> bool:
    """Whether the last number of an answer equals ``expected``; 18 equals 18.00.

    Raises ValueError if ``expected`` has no number.
    """
    number, given = last_number(expected), last_number(answer_text)
    if number is None:
        raise ValueError(f"{expected!r} is no number")
    return given is not None and Decimal(given) == Decimal(number)


def same_text(expected: str, answer_text: str) -> bool:
    """Whether the answer is the expected text, apart from white space."""
    return answer_text.split() == expected.split()


def contains_phrase(expected: str, answer_text: str) -> bool:
    """Whether the answer contains the expected words, whole and in a row; upper and lower case count as equal."""
    phrase = r"\s+".join(map(re.escape, expected.split()))
    return re.search(rf"(?<!\w){phrase}(?!\w)", answer_text, re.IGNORECASE) is not None
