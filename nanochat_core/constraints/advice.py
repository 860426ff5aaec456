"""Advises how to simplify a constraint whose compilation costs too much."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from nanochat_core.constraints.compiler import read_schema
from nanochat_core.constraints.constraint import Constraint, ConstraintError, ConstraintKind

_REPETITION = re.compile(r"\\.|\{(?P<least>\d+)(?:,(?P<most>\d*))?\}|(?P<other>[*+?])", re.DOTALL)
# Keywords of JSON schema whose value is a number of repetitions.
_COUNTS = ("maxItems", "minItems", "maxLength", "minLength", "maxProperties", "minProperties")
# The advice for a schema names one cause. It is the most expensive pattern if this pattern has at least _LARGE
# repetitions or a count of at least _LARGE. Otherwise, it is the keyword with the highest count if this count is at
# least _LARGE. Otherwise, it is the size of the schema.
_LARGE = 100


def advice(constraint: Constraint) -> str:
    """Return a clause for an error message: the reason why this constraint is expensive, and a possible change."""
    if constraint.kind is ConstraintKind.REGEX:
        repetitions, largest = _repetitions(constraint.source)
        return f"it has {_described(repetitions, largest)}; use fewer of them, lower counts, or a shorter expression"
    try:
        nodes = list(schema_nodes(read_schema(constraint)))
    except ConstraintError:
        return "send a smaller schema"
    patterns = [(path, _repetitions(pattern)) for path, pattern in schema_patterns(nodes)]
    if patterns:
        path, (repetitions, largest) = max(patterns, key=lambda item: item[1][0] + item[1][1])
        if max(repetitions, largest) >= _LARGE:
            return f"the pattern at {path[:100]} has {_described(repetitions, largest)}; simplify this pattern"
    counts = [(node[key], f"{path}/{key}") for path, node in nodes for key in _COUNTS if isinstance(node.get(key), int)]
    count, path = max(counts, default=(0, ""))
    if count >= _LARGE:
        return f"it has {len(nodes)} parts, and {path[:100]} is {str(count)[:20]}; lower this count"
    return f"it has {len(nodes)} parts (schemas and objects with schemas); use fewer properties and alternatives"


def _described(repetitions: int, largest: int) -> str:
    counted = f", and its largest count is {largest}" if largest else ""
    return f"{repetitions} repetitions such as * and {{9}}{counted}"


def _repetitions(pattern: str) -> tuple[int, int]:
    """Return the number of repetition operators in a regular expression, and their largest count.

    Operators inside character classes are counted too, although they repeat nothing: an estimate is enough for advice.
    """
    found, largest = 0, 0
    for match in _REPETITION.finditer(pattern):
        if match["least"] is not None:
            # Only the first nine digits are read, because they are enough to see that a number is too large.
            largest = max(largest, *(int((match[name] or "0")[:9]) for name in ("least", "most")))
        elif match["other"] is None:
            continue
        found += 1
    return found, largest


def schema_nodes(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the path of each object in the schema, together with the object."""
    unread: list[tuple[str, Any]] = [("#", schema)]
    while unread:
        path, node = unread.pop()
        if isinstance(node, dict):
            yield path, node
            unread += [(f"{path}/{key}"[:200], value) for key, value in node.items()]
        elif isinstance(node, list):
            unread += [(f"{path}/{i}"[:200], value) for i, value in enumerate(node)]


def schema_patterns(nodes: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, str]]:
    """Yield the path and the text of each regular expression of ``nodes``, the result of :func:`schema_nodes`.

    A schema may use the same keys for other purposes, so some of the texts may not be regular expressions.
    """
    for path, node in nodes:
        if isinstance(pattern := node.get("pattern"), str):
            yield f"{path}/pattern", pattern
        if isinstance(by_pattern := node.get("patternProperties"), dict):
            yield from ((f"{path}/patternProperties", pattern) for pattern in by_pattern)
