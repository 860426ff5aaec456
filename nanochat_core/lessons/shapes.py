"""Checks that values read from JSON have the types that the program expects."""

import math
from collections.abc import Mapping
from typing import Any

# The shape of a JSON value. A type is a shape. A list with one shape describes a list whose members have this shape. A
# mapping describes an object by the shape of each field or, if the only key is ``str``, by the shape of all fields. A
# tuple describes a value that has any one of the shapes in the tuple. The type float includes whole numbers.
Shape = type | list[Any] | Mapping[Any, Any] | tuple[Any, ...]


def check_shape(value: Any, shape: Shape, name: str) -> None:
    """Raise ValueError if a JSON value does not have the shape. The error contains the name of the wrong value.

    In a tuple of shapes, only the last shape may be a list or a mapping.
    """
    if isinstance(shape, tuple):
        if not any(isinstance(each, type) and _is(value, each) for each in shape):
            check_shape(value, shape[-1], name)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{name} is no list")
        for i, each in enumerate(value):
            check_shape(each, shape[0], f"{name}[{i}]")
    elif isinstance(shape, Mapping):
        if not isinstance(value, dict):
            raise ValueError(f"{name} is no object")
        if str in shape:
            for key, each in value.items():
                check_shape(each, shape[str], f"{name}.{key}")
        else:
            for key, inner in shape.items():
                if key not in value:
                    raise ValueError(f"{name} has no field {key!r}")
                check_shape(value[key], inner, f"{name}.{key}")
    elif not _is(value, shape):
        raise ValueError(f"{name} has the wrong type {type(value).__name__}")


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
