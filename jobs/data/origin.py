"""``data/<name>/origin.json``: the recipe and the text from which the pipeline made a dataset."""

import json
from collections.abc import Mapping
from typing import Any

from nanochat_core.errors import UserError
from nanochat_core.formats import with_format, without_format
from nanochat_core.store import Store

_FORMAT = 1


def read_origin(store: Store, name: str) -> dict[str, Any] | None:
    """The origin of the dataset ``data/<name>``, or None if the pipeline did not make it.

    Raises NewerFormatError if a newer version of nanochat wrote the file, and UserError if it is damaged.
    """
    try:
        return without_format(json.loads(store.read(_key(name))), _FORMAT, _key(name))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{_key(name)} in {store} is damaged ({error}); delete it, or make the dataset anew") from error


def write_origin(store: Store, name: str, origin: Mapping[str, Any]) -> None:
    """Write the origin of the dataset ``data/<name>``."""
    store.write(_key(name), (json.dumps(with_format(origin, _FORMAT), indent=2) + "\n").encode())


def _key(name: str) -> str:
    return f"data/{name}/origin.json"
