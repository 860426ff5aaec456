"""Reads from the store which program works on a model, and how far the training of the model has come."""

import json
import time

from nanochat_core.checkpoint import promoted
from nanochat_core.formats import NewerFormatError
from nanochat_core.progress import read_progress, steps_done
from nanochat_core.protos import engine_pb2
from nanochat_core.store import LeaseWatch, Store

# Folders of the store into which the programs of a pipeline write. While a program works, it holds a lease (a lock that
# expires) on its folder. The folder of the pipeline's last program comes first, so that program is named if several
# programs work at the same time.
_MADE_IN = ("reports", "models", "tokenizers", "data")


class TrainingWatch:
    """Watches the programs that make one model. Its methods block, and raise StoreError if the store does not answer.

    A lease shows which program runs. The progress files that the program writes show the steps of its training.
    """

    def __init__(self, store: Store, model: str) -> None:
        self._store, self._model = store, model
        self._makers = [LeaseWatch(store, f"{folder}/{model}") for folder in _MADE_IN]

    def program(self) -> str:
        """The name of the program that works on the model now; empty if no program works on it."""
        return next(filter(None, (maker.program() for maker in self._makers)), "")

    def summary(self) -> str:
        """The program that works on the model now, and how far it is, such as ``jobs.train.sft: step 12 of 320``.

        The result is only the program's name if its steps are unknown, and empty if no program works on the model.
        """
        if not (program := self.program()):
            return ""
        try:
            steps = steps_done(read_progress(self._store, self._model), program)
        except NewerFormatError:
            steps = ""
        return ": ".join(filter(None, (program, steps)))

    def progress(self, served: str) -> engine_pb2.Progress:
        """The progress of the training. ``served`` is the revision that answers new requests; empty if there is none.

        Raises FileNotFoundError if the store has no progress, and NewerFormatError if a newer version of this project
        wrote the progress.
        """
        parts = read_progress(self._store, self._model)
        if not parts:
            raise FileNotFoundError(f"progress of {self._model}")
        ref = promoted(self._store, self._model)
        updated = time.time() if self.program() else max(part.get("updated", 0.0) for part in parts.values())
        return engine_pb2.Progress(
            model=self._model,
            promoted=ref.revision if ref else "",
            served=served,
            parts_json=json.dumps(parts, separators=(",", ":")).encode(),
            age_seconds=max(0.0, time.time() - updated),
        )
