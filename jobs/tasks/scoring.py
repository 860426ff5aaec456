"""Whether an answer is right: the scorers of the chat evaluation, which are RL's rewards too.

Texts are what a person reads of an answer, without the code that it ran and what came of it.
"""

from __future__ import annotations

import re
import secrets
from decimal import Decimal

from nanochat_core.sandbox import Limits, ResultFormat, SandboxExecutor, Status

# Sign and dollar come in either order: -$5, $-5. A dot that no digit follows ends a sentence.
_FINAL = re.compile(r"####[ \t]*(-?)[ \t]*\$?[ \t]*(-?)((?:[0-9][0-9,]*)?(?:\.[0-9]+)|[0-9][0-9,]*)")
_NUMBER = re.compile(r"(?<![\w.])(-?)\$?(-?)((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)(?!\w)")
_FENCED = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
_SINGLE_LETTERS = re.compile(r"(?<!\w)\w(?!\w)(?:[\s,\-]+\w(?!\w))*")

# Processor time is what an endless loop uses up. The wall limit is far above it, so that a busy machine fails nobody.
TEST_LIMITS = Limits(wall_seconds=20.0, cpu_seconds=5.0)


class ScoringFailed(Exception):
    """The sandbox could not say whether an answer is right; nothing is known about the answer."""


def gsm8k_answer(text: str) -> str | None:
    """The final number of a GSM8K answer: the first after ``####``, without commas and ``$``, the sign kept.

    None where there is none (arXiv 2110.14168).
    """
    match = _FINAL.search(text)
    return _plain(match) if match else None


def gsm8k_correct(reference: str, answer_text: str) -> bool:
    """Whether an answer ends on the number of the dataset's own; 18 and 18.00 are the same number.

    Args:
        reference: the ``answer`` of the dataset's row, with its ``####``.

    Raises:
        ValueError: the reference has no final number.
    """
    expected, given = gsm8k_answer(reference), gsm8k_answer(answer_text)
    if expected is None:
        raise ValueError("the reference answer has no number after ####")
    return given is not None and Decimal(given) == Decimal(expected)


def last_number(text: str) -> str | None:
    """The last number of a text, without commas between thousands and ``$``; None where there is none."""
    match = None
    for match in _NUMBER.finditer(text):  # noqa: B007
        pass
    return _plain(match) if match else None


def states_number(expected: str, answer_text: str) -> bool:
    """Whether the last number of the answer is the expected one.

    Raises:
        ValueError: what is expected is no number.
    """
    number, given = last_number(expected), last_number(answer_text)
    if number is None:
        raise ValueError(f"{expected!r} is no number")
    return given is not None and Decimal(given) == Decimal(number)


def same_text(expected: str, answer_text: str) -> bool:
    """Whether the answer is the expected text, white space around and within it aside."""
    return answer_text.split() == expected.split()


def contains_phrase(expected: str, answer_text: str) -> bool:
    """Whether the answer has the expected words as whole words, in any case of letters."""
    phrase = r"\s+".join(map(re.escape, expected.split()))
    return re.search(rf"(?<!\w){phrase}(?!\w)", answer_text, re.IGNORECASE) is not None


def spells(word: str, answer_text: str) -> bool:
    """Whether the answer spells the word: its letters one by one, parted by spaces, commas or hyphens, no other."""
    spelled = ("".join(re.findall(r"\w", run)) for run in _SINGLE_LETTERS.findall(answer_text))
    return any(letters.lower() == word.lower() for letters in spelled)


def code_in(answer_text: str) -> str:
    """The first fenced block of an answer, or the whole answer where there is none."""
    match = _FENCED.search(answer_text)
    return match[1] if match else answer_text


def humaneval_program(prompt: str, answer_text: str, test: str, entry_point: str) -> str:
    """The program that raises unless the answer's function passes the tests of its problem (arXiv 2107.03374).

    A prompt is whole Python by itself, a function whose body is its docstring. So what follows may be the rest of the
    body, or the function once more, which then replaces it; what the prompt imports and defines is there in both cases.
    """
    return f"{prompt.rstrip()}\n{code_in(answer_text)}\n\n{test}\n\ncheck({entry_point})\n"


def humaneval_correct(
    executor: SandboxExecutor, prompt: str, answer_text: str, test: str, entry_point: str, limits: Limits = TEST_LIMITS
) -> bool:
    """Whether an answer to a HumanEval problem passes its tests, run in the sandbox. Blocks.

    Whatever ends the program before the end of its tests (an error, a limit, an exit) counts as wrong.

    Raises:
        ScoringFailed: the sandbox had no room for the call.
        WorkerFailed: the sandbox itself failed.
    """
    return runs_to_its_end(executor, humaneval_program(prompt, answer_text, test, entry_point), limits)


def runs_to_its_end(executor: SandboxExecutor, program: str, limits: Limits = TEST_LIMITS) -> bool:
    """Whether a program runs to its last line in the sandbox, without an error. Blocks.

    Raises:
        ScoringFailed: the sandbox had no room for the call.
        WorkerFailed: the sandbox itself failed.
    """
    # A program that ends itself early may look like one that has passed. This word comes after its last line.
    word = secrets.token_hex(16)
    result = executor.execute_sync(f"{program}\n{word!r}\n", limits, ResultFormat.STR)
    if result.status is Status.OVERLOADED:
        raise ScoringFailed(result.error)
    return result.ok and result.result == word


def _plain(match: re.Match[str]) -> str:
    before, after, digits = match.groups()
    return ("-" if before or after else "") + digits.replace(",", "")
