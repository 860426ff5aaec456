"""The progress of a model's training, as files of the artifact store.

The jobs write the files while they train, and the engine reads them for the chat page. The page therefore also shows a
run on another machine, and a page that is opened during a run shows the run from its beginning.

The folder ``progress/<model>/`` has the following files. Each write replaces a file, so earlier states are not kept.

- ``run.json``, which the pipeline writes: ``recipe``, ``stages`` (names in their order), ``tokens`` (number of tokens
  on which each stage trains, by stage), ``stage`` (the stage that runs or ran last), ``state`` (``running``,
  ``stopped``, ``failed``, ``refused`` or ``promoted``), ``seconds`` (durations of finished stages, by stage).
- ``<stage>.json``, which a training stage writes: ``program`` (the program's name, as in its lease), ``step`` (steps
  done), ``steps`` (all steps of the stage), ``batch_tokens`` (tokens per step), ``tokens_per_second`` (null while
  unknown), ``eta_seconds`` (remaining time, null while unknown), ``compiling`` (whether the next step compiles the
  model), ``curve`` (pairs of a step and a loss in nats), ``held_out`` (points with a ``step`` and metrics by name) and
  ``answers`` (points with a ``step`` and the pairs of a question and the model's answer).

Each file also has ``updated``, the time of writing in seconds since the epoch.
"""

import contextlib
import datetime
import json
import time
from collections.abc import Mapping
from typing import Any

from nanochat_core.formats import with_format, without_format
from nanochat_core.store import Store

RUN = "run"
PROGRESS_FORMAT = 1


def write_progress(store: Store, model: str, part: str, fields: Mapping[str, Any]) -> None:
    """Replace ``progress/<model>/<part>.json``. Raises StoreError if the store fails."""
    content = with_format({**fields, "updated": round(time.time(), 1)}, PROGRESS_FORMAT)
    store.write(_key(model, part), json.dumps(content, separators=(",", ":")).encode())


def remove_progress(store: Store, model: str, part: str) -> None:
    """Remove ``progress/<model>/<part>.json``. On a file system, also remove its folders if they are empty then.

    Raises StoreError if the store fails.
    """
    key = _key(model, part)
    with contextlib.suppress(FileNotFoundError):
        store.remove_version(key, store.read_version(key)[1])


def read_progress(store: Store, model: str) -> dict[str, dict[str, Any]]:
    """The content of all progress files of a model, by file name without ``.json``; empty if there are no files.

    A damaged file is left out. Raises NewerFormatError if a newer version of nanochat wrote a file.
    """
    parts: dict[str, dict[str, Any]] = {}
    for key in store.keys(f"progress/{model}"):
        name = key.rpartition("/")[2]
        try:
            parts[name.removesuffix(".json")] = without_format(json.loads(store.read(key)), PROGRESS_FORMAT, key)
        except (ValueError, FileNotFoundError):
            continue
    return parts


def steps_done(parts: Mapping[str, Mapping[str, Any]], program: str) -> str:
    """How far ``program`` has trained, such as ``step 120 of 320, 0:01:35 left``.

    ``parts`` is a result of :func:`read_progress`. The result is empty if no part was written by ``program``.
    """
    told = next((part for part in parts.values() if part.get("program") == program and "step" in part), None)
    if told is None:
        return ""
    left = told.get("eta_seconds")
    time_left = "" if left is None else f", {datetime.timedelta(seconds=round(left))} left"
    return f"step {told['step']} of {told.get('steps')}{time_left}"


def _key(model: str, part: str) -> str:
    return f"progress/{model}/{part}.json"
