"""Reads the tokenizer file of karpathy/nanochat (upstream) without executing anything in it.

``tokenizer.pkl`` is a pickled ``tiktoken.Encoding``. A pickle is a program, and Python's own loader would let it call
any function of this machine. So this module interprets the pickle itself: it carries out the few instructions that a
pickled ``tiktoken.Encoding`` needs (pickle protocol 4 and later) on plain data, and refuses all other instructions. The
only class that the file may name is ``tiktoken.Encoding``. Instead of an instance of this class, the module makes a
record of the constructor's arguments; it imports nothing and calls nothing that the file names.
"""

import dataclasses
import pickletools
from pathlib import Path
from typing import Any

from nanochat_core.errors import UserError
from nanochat_core.tokenizer import Tokenizer

ENCODING_CLASS = ("tiktoken.core", "Encoding")
# Largest size of a tokenizer file, and largest number of pickle instructions in it, so that a damaged file cannot make
# us allocate too much memory. For comparison: a vocabulary of 200,000 tokens takes 4 MB and 600,000 instructions.
MAX_BYTES = 64 * 2**20
MAX_INSTRUCTIONS = 2**21
_ARGUMENTS = {"name", "pat_str", "mergeable_ranks", "special_tokens"}

_LITERALS = {"BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BININT", "BININT1", "BININT2"}
_NAMES_A_GLOBAL = {"GLOBAL", "INST"}


@dataclasses.dataclass(eq=False)
class _Encoding:
    """Takes the place of the pickled ``tiktoken.Encoding``, and stores the arguments of that class's constructor."""

    arguments: Any = None


def read_upstream_tokenizer(path: Path) -> Tokenizer:
    """Read upstream's ``tokenizer.pkl``.

    Raises UserError if the file cannot be read, is damaged, has instructions that no tokenizer file needs, or has other
    special tokens than ours.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path} has {size:,} bytes, which is too large for a tokenizer")
        encoding = _construct(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except _Refused as refused:
        raise UserError(f"{path} is refused, and nothing in it was executed: {refused}") from refused
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} while reading it") from error
    if isinstance(encoding.arguments, str):
        raise UserError(f"{path} is only a reference to an encoding of tiktoken, not a trained tokenizer")
    return _tokenizer(path, encoding.arguments)


def _tokenizer(path: Path, arguments: Any) -> Tokenizer:
    if not isinstance(arguments, dict) or set(arguments) != _ARGUMENTS:
        raise UserError(f"{path} holds no tokenizer: its fields are not {', '.join(sorted(_ARGUMENTS))}")
    pattern, ranks, special = (arguments[name] for name in ("pat_str", "mergeable_ranks", "special_tokens"))
    if not isinstance(pattern, str) or not _maps(ranks, bytes) or not _maps(special, str):
        raise UserError(f"{path} holds no tokenizer: a field is of another type")
    tokens = sorted(ranks, key=lambda token: ranks[token])
    if any(ranks[token] != number for number, token in enumerate(tokens)) or b"" in ranks:
        raise UserError(f"{path}: the ranks of its {len(ranks)} tokens are not 0, 1, 2, …, or one stands for no byte")
    try:
        tokenizer = Tokenizer(tokens, pattern)
    except ValueError as error:
        raise UserError(f"{path}: tiktoken refuses its split pattern: {' '.join(str(error).split())}") from error
    if special != tokenizer.special_ids:
        expected = f"{', '.join(tokenizer.special_ids)} from id {len(tokens)} on"
        raise UserError(f"{path} has other special tokens than this version, which are {expected}")
    return tokenizer


def _maps(value: Any, key_type: type) -> bool:
    return isinstance(value, dict) and all(type(k) is key_type and type(v) is int for k, v in value.items())


class _Refused(Exception):
    """The file has an instruction or a name that no tokenizer file needs."""


def _construct(data: bytes) -> _Encoding:
    """Carry out the instructions of a pickled ``tiktoken.Encoding``.

    Every value is a str, bytes, int, dict, the empty tuple, the constant ENCODING_CLASS or an :class:`_Encoding`.

    Raises:
        _Refused: the file has an instruction or a name that no tokenizer file needs.
        ValueError, IndexError, KeyError, TypeError: the file is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    # genops only decodes instructions and their literal arguments, and executes nothing.
    for number, (instruction, literal, _) in enumerate(pickletools.genops(data)):
        if number == MAX_INSTRUCTIONS:
            raise _Refused(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
        name = instruction.name
        if name in _LITERALS:
            stack.append(literal)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(literal or 0)])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "SETITEMS":
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            _set_items(stack[-1], items)
        elif name == "SETITEM":
            items = [stack.pop(), stack.pop()]
            _set_items(stack[-1], items[::-1])
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            if not isinstance(module, str) or not isinstance(attribute, str):
                raise TypeError("a name is no string")
            if (module, attribute) != ENCODING_CLASS:
                raise _Refused(_foreign(f"{module}.{attribute}"))
            stack.append(ENCODING_CLASS)
        elif name == "NEWOBJ":
            if stack.pop() != () or stack.pop() is not ENCODING_CLASS:
                raise _Refused("it makes an object that is no tiktoken.core.Encoding")
            stack.append(_Encoding())
        elif name == "BUILD":
            arguments = stack.pop()
            if not isinstance(stack[-1], _Encoding) or stack[-1].arguments is not None:
                raise _Refused("it sets the state of an object that is no new tiktoken.core.Encoding")
            stack[-1].arguments = arguments
        elif name == "STOP":
            break
        elif name in _NAMES_A_GLOBAL:
            raise _Refused(_foreign(str(literal)))
        elif name not in ("PROTO", "FRAME"):
            raise _Refused(f"no tokenizer file needs the instruction {name}")
    if len(stack) != 1 or not isinstance(stack[0], _Encoding):
        raise _Refused("it holds something else than a tiktoken.core.Encoding")
    return stack[0]


def _foreign(name: str) -> str:
    return f"it names {ascii(name)[:100]}, where only {'.'.join(ENCODING_CLASS)} may be named"


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise TypeError("items for something that is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | bytes):
            raise TypeError("a key that is neither str nor bytes")
        target[key] = value
