"""The messages between the judge, which runs the tests, and the candidate, which runs the tested function.

The judge sends the arguments of a call, and the candidate answers with the function's value. Values are sent as plain
data: each value is a JSON list with the name of its type and then its parts. The judge builds only values of the types
in this file. So the judge never runs code, methods or comparisons that the candidate has defined.
"""

import builtins
import decimal
import fractions
import itertools
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

_FROM_PEER, _TO_PEER = 4, 5
_MAX_MESSAGE_BYTES = 16 << 20
# An iterator with more items than this is not exchanged, because it may be endless.
_MAX_ITEMS = 100_000


class NotData(Exception):
    """A value is not plain data, so it cannot be exchanged."""


class CandidateEnded(Exception):
    """The candidate has ended or has violated the protocol."""


class Foreign:
    """Represents a value that is not plain data. It is equal to no value, not even to itself."""

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{self.type_name}>"


def encode(value: Any) -> list[Any]:
    """Describe a value by plain JSON. A value of a subclass is described as a value of its base type, such as int."""
    if value is None:
        return ["none"]
    if isinstance(value, bool):
        return ["bool", value is True]
    if isinstance(value, int):
        return ["int", hex(int.__pos__(value))]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, complex):
        return ["complex", float.hex(value.real), float.hex(value.imag)]
    if isinstance(value, str):
        return ["str", str.__str__(value)]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes" if isinstance(value, bytes) else "bytearray", bytes(value).hex()]
    if isinstance(value, range):
        return ["range", *(encode(part) for part in (value.start, value.stop, value.step))]
    if isinstance(value, dict):
        return ["dict", *([encode(key), encode(item)] for key, item in dict.items(value))]
    kind: Any
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, *map(encode, kind.__iter__(value))]
    if isinstance(value, fractions.Fraction):
        return ["fraction", encode(value.numerator), encode(value.denominator)]
    if isinstance(value, decimal.Decimal):
        return ["decimal", decimal.Decimal.__str__(value)]
    if hasattr(type(value), "__next__"):  # an iterator, such as a generator
        items = list(itertools.islice(value, _MAX_ITEMS + 1))
        if len(items) <= _MAX_ITEMS:
            return ["iterator", *map(encode, items)]
    return ["foreign", type(value).__name__]


def decode(data: Any) -> Any:
    """Build the value that ``data`` describes. Raises NotData if ``data`` describes no value."""
    try:
        kind, *parts = data
        if kind in ("list", "tuple", "set", "frozenset"):
            return getattr(builtins, kind)([decode(part) for part in parts])
        if kind == "dict":
            return {decode(key): decode(item) for key, item in parts}
        if kind == "iterator":
            return iter([decode(part) for part in parts])
        if kind == "fraction":
            return fractions.Fraction(*map(decode, parts))
        if kind == "range":
            return range(*(decode(part) for part in parts))
        if kind == "none":
            return None
        if kind == "complex":
            return complex(*map(float.fromhex, parts))
        (part,) = parts
        if kind == "bool" and type(part) is bool:
            return part
        if kind == "int":
            return int(part, 16)
        if kind == "float":
            return float.fromhex(part)
        if kind == "decimal" and type(part) is str:
            return decimal.Decimal(part)
        if kind == "str" and type(part) is str:
            return part
        if kind in ("bytes", "bytearray"):
            return getattr(builtins, kind).fromhex(part)
        if kind == "foreign" and type(part) is str:
            return Foreign(part)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise NotData(str(error)) from None
    raise NotData(f"a value of the type {kind!r}")


def send(message: object) -> None:
    """Write a message to the other side."""
    data = json.dumps(message).encode()
    data = len(data).to_bytes(4, "big") + data
    while data:
        data = data[os.write(_TO_PEER, data) :]


def receive() -> Any:
    """Read a message. Raises CandidateEnded if the other side has ended, or if the message is too long or not JSON."""
    length = int.from_bytes(_read(4), "big")
    if length > _MAX_MESSAGE_BYTES:
        raise CandidateEnded(f"a message of {length} bytes")
    try:
        return json.loads(_read(length))
    except ValueError as error:
        raise CandidateEnded(f"a message that is no JSON: {error}") from None


def _read(count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = os.read(_FROM_PEER, count - len(data))
        if not piece:
            raise CandidateEnded("the candidate has ended")
        data += piece
    return bytes(data)


def examine(context: str, tests: str, function: str) -> None:
    """Run ``check(candidate)`` of ``tests``. Each call of ``candidate`` becomes a message to the other side."""
    sys.setrecursionlimit(10_000)  # high, because encode and decode call themselves for each level of a nested value

    def candidate(*arguments: object, **named: object) -> Any:
        for value in (*arguments, *named.values()):
            if isinstance(decode(encode(value)), Foreign):
                raise NotData(f"the tests pass a {type(value).__name__}, which is not plain data")
        try:
            send([encode(arguments), encode(named)])
        except BrokenPipeError:
            raise CandidateEnded("the candidate has ended") from None
        answer = receive()
        if not (type(answer) is list and len(answer) == 2):
            raise CandidateEnded("a message that is no answer")
        kind, content = answer
        if kind == "value":
            return decode(content)
        raise _exception(kind, str(content))  # tests may expect an exception

    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(context, "<context>", "exec"), namespace)  # noqa: S102 - this runs in a sandbox
    namespace[function] = candidate
    exec(compile(tests, "<tests>", "exec"), namespace)  # noqa: S102
    namespace["check"](candidate)


def _exception(kind: Any, text: str) -> Exception:
    """Build an exception. The candidate can only name a built-in exception; any other name becomes a RuntimeError."""
    known = getattr(builtins, kind, None) if type(kind) is str else None
    if not (isinstance(known, type) and issubclass(known, Exception)):
        known = RuntimeError
    return _BUILDERS.get(known, known)(text)


# Builds the exceptions whose constructors need more than a text.
_BUILDERS: dict[type[Exception], Callable[[str], Exception]] = {
    UnicodeDecodeError: lambda text: UnicodeDecodeError("", b"", 0, 0, text),
    UnicodeEncodeError: lambda text: UnicodeEncodeError("", "", 0, 0, text),
    UnicodeTranslateError: lambda text: UnicodeTranslateError("", 0, 0, text),
    ExceptionGroup: lambda text: ExceptionGroup(text, [RuntimeError(text)]),
}


def answer_calls(code: str, function: str) -> NoReturn:
    """Run ``code``, which defines the function. Then answer each message with arguments by calling the function.

    An answer contains the function's value, or the name and the text of its exception.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "<code>", "exec"), namespace)  # noqa: S102 - this runs in a sandbox
    while True:
        arguments, named = receive()
        try:
            answer = ["value", encode(namespace[function](*decode(arguments), **decode(named)))]
        except Exception as error:
            answer = [type(error).__name__, str(error)]
        send(answer)
