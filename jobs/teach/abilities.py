"""Turns a worked example with Python into an ability: the model learns to compute the answer for other arguments too.

The arguments are the whole numbers and strings of the code that also occur in the question. For example, in "How many
days are there from 1990 to 2000?" with the code ``(2000 - 1990) * 365``, the arguments are 2000 and 1990. In "Reverse
the word harbor." with the code ``'harbor'[::-1]``, the argument is ``harbor``.

A drill is such a question with new arguments, together with the code for these arguments and the output of this code in
the sandbox. The output that the example states must also equal the output of the example's code in the sandbox.
"""

from __future__ import annotations

import ast
import dataclasses
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence

from jobs.demo_world.words import ENGLISH, made_up_word
from jobs.teach.wordings import wordings
from nanochat_core.chat import Message, Part, tool_output_text
from nanochat_core.errors import UserError
from nanochat_core.lessons.items import Item
from nanochat_core.sandbox import Limits, ResultFormat, SandboxExecutor, Status

# Largest number of drills of each ability for training, and number of its drills for the examination. A drill is the
# ability's question with new arguments, and no two drills have the same arguments.
DRILLS, EXAMINED = 400, 20
_LONGEST_OUTPUT = 60
_TRIES = 4
_SECONDS = 2.0
# The lesson fails if the code takes _SECONDS or longer for more than this many draws of arguments.
_MOST_LATE = 5

Value = int | str
Drill = tuple[Message, Message]


@dataclasses.dataclass(frozen=True)
class Ability:
    """A worked example and its arguments: constants of the code that also occur in the question."""

    question: str
    code: str
    output: str
    answer: str
    arguments: tuple[Value, ...]

    def draw(self, rng: random.Random) -> dict[Value, Value]:
        """Draw a new argument for each old one.

        The new numbers have about as many digits as the old ones, and the same order by size, but two of them may be
        equal. New strings are words.
        """
        numbers = [old for old in self.arguments if isinstance(old, int)]
        drawn = sorted(draw_number(old, rng) for old in numbers)
        new: dict[Value, Value] = dict(zip(sorted(numbers), drawn, strict=True))
        return {old: new[old] if old in new else draw_word(rng) for old in self.arguments}

    def with_arguments(self, new: Mapping[Value, Value]) -> str:
        """The code, with each argument that is a key of ``new`` replaced by its value."""
        code = self.code
        for node in reversed(_constants(code)):
            if isinstance(node.value, int | str) and node.value in new:
                start, end = _span(code, node)
                code = code[:start] + repr(new[node.value]) + code[end:]
        return code

    def drill(self, new: Mapping[Value, Value], code: str, output: str, rng: random.Random) -> Drill:
        """The question with new arguments in a random wording, and its answer with ``code`` and ``output``."""
        words = {str(old): str(other) for old, other in new.items()}
        question = wordings(replaced(self.question, words)).draw(rng)
        answer = replaced(self.answer, {**words, self.output: output})
        parts = (Part("python", code), Part("python_output", output), Part("text", answer))
        return Message("user", (Part("text", question),)), Message("assistant", parts)


def ability_of(item: Item) -> Ability | None:
    """The ability of which an item is an example; None if the item is not such an example.

    An example is a single question whose answer is code, the code's output and a text. It has at least one argument.
    Raises UserError if the code is not Python.
    """
    if not item.alone or [part.type for part in item.messages[-1].parts] != ["python", "python_output", "text"]:
        return None
    code, output, answer = (part.text for part in item.messages[-1].parts)
    try:
        values = dict.fromkeys(node.value for node in _constants(code) if isinstance(node.value, int | str))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise UserError(f"the code of {item.question[:60]!r} is not Python: {error}") from error
    found = tuple(value for value in values if str(value) and _occurs(str(value), item.question))
    return Ability(item.question, code, output, answer, found) if found else None


def with_output(item: Item, sandbox: SandboxExecutor) -> Item:
    """The item, with the output of its Python code added if its last answer is code and a text, without an output.

    Raises UserError if the code fails in the sandbox.
    """
    if not item.messages or [part.type for part in item.messages[-1].parts] != ["python", "text"]:
        return item
    code, text = item.messages[-1].parts
    output = output_of(sandbox, code.text)
    if output is None:
        raise UserError(f"the code of {item.question[:60]!r} fails in the sandbox")
    answer = Message("assistant", (code, Part("python_output", output), text))
    return dataclasses.replace(item, messages=(*item.messages[:-1], answer))


def drills(
    ability: Ability, sandbox: SandboxExecutor, rng: random.Random, check: Callable[[], None] = lambda: None
) -> tuple[list[Drill], list[Drill]]:
    """Draw drills for training and drills for the examination: the ability's question with new arguments, and answers.

    Drawn arguments give no drill if they were drawn before, if the code fails, or if its output is empty or too long.
    ``check`` is called before each run of the code with drawn arguments, and may raise an error.

    Raises UserError if the sandbox gives another output than the example, if there are too few drills, or if the code
    takes :data:`_SECONDS` or longer for more than :data:`_MOST_LATE` draws of arguments.
    """
    if (said := output_of(sandbox, ability.code)) != ability.output.strip():
        raise UserError(f"{ability.question[:60]!r}: the example says {ability.output!r}, and its code gives {said!r}")
    seen: set[str] = set()
    found: list[Drill] = []
    late = 0
    for _ in range(_TRIES * (DRILLS + EXAMINED)):
        new = ability.draw(rng)
        code = ability.with_arguments(new)
        if code in seen:
            continue
        seen.add(code)
        check()
        began = time.monotonic()
        output = output_of(sandbox, code)
        late += time.monotonic() - began >= _SECONDS
        if late > _MOST_LATE:
            raise UserError(
                f"{ability.question[:60]!r}: the code takes longer than {_SECONDS:.0f} seconds with other arguments, "
                f"such as {new}"
            )
        if output is not None and 0 < len(output) <= _LONGEST_OUTPUT:
            found.append(ability.drill(new, code, output, rng))
        if len(found) == DRILLS + EXAMINED:
            break
    if len(found) < 2 * EXAMINED:
        raise UserError(f"{ability.question[:60]!r}: the code fails with other arguments, such as {ability.draw(rng)}")
    return found[EXAMINED:], found[:EXAMINED]


def output_of(sandbox: SandboxExecutor, code: str) -> str | None:
    """The output that the model would read after this code; None if the code fails."""
    result = sandbox.execute_sync(code, Limits(wall_seconds=_SECONDS), ResultFormat.STR)
    return tool_output_text(result.result, result.stdout, result.error) if result.status is Status.OK else None


def _constants(code: str) -> list[ast.Constant]:
    """The whole numbers and strings in the code, in their order."""
    found = [
        node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant) and type(node.value) in (int, str)
    ]
    return sorted(found, key=lambda node: (node.lineno, node.col_offset))


def _span(code: str, node: ast.Constant) -> tuple[int, int]:
    """The index of the first character of a constant in the code, and the index after its last character."""
    lines = code.splitlines(keepends=True)

    def position(line: int, offset: int) -> int:
        return sum(map(len, lines[: line - 1])) + len(lines[line - 1].encode()[:offset].decode())

    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return position(node.lineno, node.col_offset), position(node.end_lineno, node.end_col_offset)


def _occurs(word: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def replaced(text: str, words: Mapping[str, str]) -> str:
    """The text, with each whole word that is a key of ``words`` replaced by its value.

    The inserted values are not searched for further keys.
    """
    longest_first: Sequence[str] = sorted(words, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    return re.sub(rf"(?<!\w)(?:{pattern})(?!\w)", lambda match: words[match[0]], text)


def draw_number(old: int, rng: random.Random) -> int:
    """A random number with as many digits as ``old``; one digit more or less is possible if ``old`` is below 1000."""
    digits = len(str(abs(old)))
    digits = max(1, digits + rng.choice((0, 0, 0, 0, -1, 1))) if digits < 4 else digits
    return rng.randrange(10 ** (digits - 1), 10**digits)


def draw_word(rng: random.Random) -> str:
    """Draw an English word or a made-up word; both kinds are equally likely."""
    return rng.choice(ENGLISH.train) if rng.random() < 0.5 else made_up_word(rng, "train")
