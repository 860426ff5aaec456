"""Typed settings: every field of a frozen dataclass is one flag and one environment variable.

A flag takes precedence over the environment variable, and the variable takes precedence over the default. A program may
replace defaults by values that follow from the given settings. Values are converted and checked when the program
starts. An invalid value raises a :class:`~nanochat_core.errors.UserError` that says where the value came from.
"""

import argparse
import dataclasses
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from nanochat_core.errors import UserError

T = TypeVar("T")

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}
# The maximum of a whole number whose setting declares no maximum, because torch and numpy compute with 64 bits.
_LARGEST = 2**63 - 1
# The name under which the parser's result has the arguments that belong to no flag.
_WORDS = "words"


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    env: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    secret: bool = False,
    positional: bool = False,
) -> Any:
    """Declares one field of a settings dataclass.

    Args:
        default: value if neither flag nor variable is given; a setting without a default is required and not empty.
        help: phrase for ``--help`` and the documentation, in lower case, with the unit and without a full stop.
        env: environment variable; by default ``<PREFIX>_<FIELD>``.
        minimum, maximum: inclusive bounds of a number.
        secret: whether :func:`describe`, logs and the repr hide the value.
        positional: whether the value may also be given without its flag. The value is then made of all arguments that
            belong to no flag: they are joined by spaces, or by commas if the field is a tuple. Only one field of a
            dataclass may be positional.
    """
    metadata = {"help": help, "env": env, "minimum": minimum, "maximum": maximum, "secret": secret}
    return dataclasses.field(default=default, metadata=metadata | {"positional": positional}, repr=not secret)


def load(
    cls: type[T],
    *,
    prefix: str,
    program: str,
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
    inherit: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> T:
    """Builds ``cls`` from flags and environment variables.

    Raises UserError if a value is missing, has the wrong type or is out of bounds, if a setting is given both by its
    flag and by words without a flag, or if the ``__post_init__`` of ``cls`` raises ValueError for a combination of
    values. An unknown flag ends the program with exit code 2, and ``--help`` ends it with exit code 0.

    Args:
        cls: a dataclass whose fields were declared with :func:`setting`. Supported types: ``str``, ``int``,
            ``float``, ``bool``, ``tuple[str, ...]`` (comma separated), ``Literal[...]`` and ``X | None``.
        prefix: beginning of the environment variables' names, such as ``NANOCHAT_ENGINE``.
        program: program name in the usage text, such as ``python -m services.engine``.
        inherit: called with the values that flags and variables give, by field name; returns values of other fields,
            which replace their defaults.
    """
    environ = os.environ if environ is None else environ
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    summary = (cls.__doc__ or "").strip().split("\n\n")[0]
    parser = argparse.ArgumentParser(prog=program, description=summary, allow_abbrev=False)
    for field in fields:
        text = f"{field.metadata['help']} [{_default_text(field)}{_env_name(field, prefix)}]".replace("%", "%%")
        kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if hints[field.name] is bool else {}
        parser.add_argument(_flag(field), dest=field.name, default=argparse.SUPPRESS, help=text, **kind)
        if field.metadata["positional"]:
            parser.add_argument(
                _WORDS, nargs="*", metavar=field.name.upper(), default=argparse.SUPPRESS, help=f"same as {_flag(field)}"
            )
    arguments, words = list(sys.argv[1:] if argv is None else argv), list[str]()
    if any(field.metadata["positional"] for field in fields) and "--" in arguments:
        end = arguments.index("--")
        arguments, words = arguments[:end], arguments[end + 1 :]
    given = vars(parser.parse_intermixed_args(arguments))
    words = [*given.pop(_WORDS, []), *words]
    values: dict[str, Any] = {}
    for field in fields:
        variable = _env_name(field, prefix)
        if words and field.metadata["positional"]:
            if field.name in given:
                raise UserError(f"{' '.join(words)!r} and {_flag(field)} give the same setting; use only one of them")
            raw, source = ("," if typing.get_origin(hints[field.name]) is tuple else " ").join(words), _flag(field)
        elif field.name in given:
            raw, source = given[field.name], _flag(field)
        elif environ.get(variable, "") != "":
            raw, source = environ[variable], variable
        else:
            continue
        if raw == "" and field.default is dataclasses.MISSING:
            raise UserError(f"{source} is empty; it is required: {field.metadata['help']}")
        values[field.name] = raw if isinstance(raw, bool) else _convert(raw, hints[field.name], source)
        _check_bounds(values[field.name], field, source)
    inherited = inherit(values) if inherit else {}
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    values = {**defaults, **inherited, **values}
    for field in fields:
        if field.name not in values:
            raise UserError(f"{_flag(field)} (or {_env_name(field, prefix)}) is required: {field.metadata['help']}")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(str(error)) from error


def describe(settings: Any) -> dict[str, Any]:
    """The settings as a plain dictionary for a log line, with ``***`` in place of each secret that is set."""
    values = {field: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {field.name: "***" if field.metadata.get("secret") and value else value for field, value in values.items()}


def _flag(field: dataclasses.Field[Any]) -> str:
    return "--" + field.name.replace("_", "-")


def _env_name(field: dataclasses.Field[Any], prefix: str) -> str:
    return field.metadata.get("env") or f"{prefix}_{field.name.upper()}"


def _default_text(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING or field.default in (None, "", ()) or field.metadata["secret"]:
        return ""
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    return f"default {default}; "


def _convert(raw: str, hint: Any, source: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        return _convert(raw, inner[0], source)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if raw not in choices:
            raise UserError(f"{source} is {raw!r}; choose one of {', '.join(map(str, choices))}")
        return raw
    if origin is tuple:
        return tuple(part.strip() for part in raw.split(",") if part.strip())
    if hint is bool:
        lowered = raw.strip().lower()
        if lowered not in _TRUE | _FALSE:
            raise UserError(f"{source} is {raw!r}; use true or false")
        return lowered in _TRUE
    if hint in (int, float):
        try:
            return hint(raw)
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise UserError(f"{source} is {raw!r}, which is not {kind}") from None
    if hint is str:
        return raw
    raise TypeError(f"settings of type {hint} are not supported")


def _check_bounds(value: Any, field: dataclasses.Field[Any], source: str) -> None:
    low, high = field.metadata["minimum"], field.metadata["maximum"]
    if high is None and type(value) is int:
        high = _LARGEST
    if value is None or isinstance(value, str | tuple):
        return
    if low is not None and not value >= low:
        raise UserError(f"{source} is {value}; it must be at least {low}")
    if high is not None and not value <= high:
        raise UserError(f"{source} is {value}; it must be at most {high}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{source} is {value}; it must be a finite number")
