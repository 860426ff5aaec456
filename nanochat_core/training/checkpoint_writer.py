"""Writes checkpoints: from several ranks, in the background, and never in place of a whole one that exists.

Training waits while tensors are copied into main memory; hashing and transfer happen in a thread. Every rank writes
the optimizer state that it holds; the first one also writes what exists once, and the manifest when all others are
done, which is what makes the checkpoint exist.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from nanochat_core.checkpoint import CONFIG, MANIFEST, META, TOKENIZER, TRAINER_STATE, WEIGHTS, CheckpointRef, sha256_of
from nanochat_core.model import GPT
from nanochat_core.store import Store, StoreError
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.distributed import ALONE, RankLost, Ranks
from nanochat_core.training.optim import Shard

log = logging.getLogger(__name__)

# A store that is gone for longer than the sum of these is reported.
RETRY_SECONDS = (1.0, 5.0, 20.0)
# How long ranks wait in the background for the slowest one's transfer.
_TRANSFER_SECONDS = 3600.0


@dataclasses.dataclass(frozen=True)
class _Copied:
    """What training no longer changes: ``rows`` has first row and number of rows of each of ``tensors``."""

    weights: dict[str, Tensor]
    texts: dict[str, str]
    values: str
    tensors: dict[str, Tensor]
    rows: dict[str, tuple[int, int]]


class CheckpointWriter:
    """Writes one checkpoint at a time; every rank must make the same calls."""

    def __init__(self, store: Store, ranks: Ranks = ALONE, retry_seconds: Sequence[float] = RETRY_SECONDS) -> None:
        self._store, self._retry_seconds = store, retry_seconds
        self._ranks = ranks.side_channel(_TRANSFER_SECONDS)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        ref: CheckpointRef,
        *,
        model: GPT,
        tokenizer: Tokenizer,
        meta: Mapping[str, Any],
        values: Mapping[str, Any] | None = None,
        shards: Iterable[Shard] = (),
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy everything and start to write it; an unfinished earlier checkpoint is waited for.

        Args:
            model, tokenizer, meta, values: what exists once; the first rank's are written.
            values: plain data needed to resume training; without it the checkpoint cannot be resumed from.
            shards: this rank's part of the tensors needed to resume training.
            then: called by the first rank, in the background, when the checkpoint is complete.

        Raises:
            StoreError: the earlier checkpoint could not be written.
        """
        self.wait()
        shards = list(shards)
        copied = _Copied(
            weights={name: _copy(tensor) for name, tensor in model.state_dict().items()} if self._ranks.leads else {},
            texts={
                CONFIG: model.config.to_json(),
                TOKENIZER: tokenizer.to_json(),
                META: json.dumps(dict(meta) | {"tokenizer_digest": tokenizer.digest}, indent=2) + "\n",
            },
            # Plain data too may change while it is being written.
            values=json.dumps(values),
            tensors={shard.name: _copy(shard.tensor) for shard in shards},
            rows={shard.name: (shard.start, shard.tensor.size(0)) for shard in shards},
        )

        def write() -> None:
            try:
                self._write(ref, copied, then)
            except BaseException as error:
                self._error = error  # for the next wait

        # A daemon, because the thread waits for other ranks, and must not keep a process whose others are lost.
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            StoreError: the last checkpoint could not be written; those before it are still there.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        """Wait for what is being written, unless it cannot be finished because a rank is lost."""
        if kind is None:
            self.wait()
        elif not issubclass(kind, RankLost):
            with contextlib.suppress(StoreError):  # of two errors the other one is the reason for this one
                self.wait()

    def _write(self, ref: CheckpointRef, copied: _Copied, then: Callable[[], None]) -> None:
        for wait in (*self._retry_seconds, None):
            try:
                self._write_once(ref, copied)
                break
            except StoreError as error:
                if wait is None:
                    raise
                log.warning(
                    "a checkpoint could not be written and is tried again",
                    extra={"checkpoint": ref.prefix, "reason": str(error), "wait_seconds": wait},
                )
                time.sleep(wait)
        if self._ranks.leads:
            then()

    def _write_once(self, ref: CheckpointRef, copied: _Copied) -> None:
        """One attempt; on an error every rank raises it."""
        try:
            # Whoever reads meanwhile finds no manifest, so old and new files are never taken for one checkpoint.
            self._together(lambda: self._store.delete(ref.prefix) if self._ranks.leads else None)
            written = self._together(lambda: self._write_own(ref, copied))
            self._together(lambda: self._write_shared(ref, copied, written) if self._ranks.leads else None)
        except StoreError:
            if self._ranks.leads:
                with contextlib.suppress(StoreError):
                    self._store.delete(ref.prefix)
            raise

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """Do something on every rank; its result on each, or the same error on all."""
        try:
            outcome = {"result": work()}
        except StoreError as error:
            outcome = {"error": str(error)}
        outcomes = self._ranks.gather(outcome)
        for rank, outcome in enumerate(outcomes):
            if "error" in outcome:
                where = f"rank {rank}: " if self._ranks.size > 1 else ""
                raise StoreError(where + outcome["error"])
        return [outcome["result"] for outcome in outcomes]

    def _write_own(self, ref: CheckpointRef, copied: _Copied) -> dict[str, Any] | None:
        if not copied.tensors:
            return None
        name = f"optim/rank_{self._ranks.rank:05d}_of_{self._ranks.size:05d}.safetensors"
        with self._file(ref, name) as (path, entry):
            _save_tensors(copied.tensors, path)
        return {"name": name, "entry": entry, "rows": copied.rows}

    def _write_shared(self, ref: CheckpointRef, copied: _Copied, written: list[dict[str, Any] | None]) -> None:
        manifest: dict[str, Any] = {}
        index: dict[str, Any] = {}
        for part in written:
            if part is not None:
                manifest[part["name"]], index[part["name"]] = part["entry"], part["rows"]
        texts = dict(copied.texts)
        values = json.loads(copied.values)
        if values is not None:
            texts[TRAINER_STATE] = json.dumps({"values": values, "tensors": index})
        for name, text in texts.items():
            with self._file(ref, name) as (path, manifest[name]):
                path.write_text(text)
        with self._file(ref, WEIGHTS) as (path, manifest[WEIGHTS]):
            _save_tensors(copied.weights, path)
        self._store.write(f"{ref.prefix}/{MANIFEST}", (json.dumps({"files": manifest}, indent=2) + "\n").encode())

    @contextlib.contextmanager
    def _file(self, ref: CheckpointRef, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """A path to write one file to, and its manifest entry, filled in on exit."""
        entry: dict[str, Any] = {}
        with self._store.create(f"{ref.prefix}/{name}") as path:
            yield path, entry
            entry |= {"size": path.stat().st_size, "sha256": sha256_of(path)}


def save_checkpoint(
    store: Store,
    ref: CheckpointRef,
    *,
    model: GPT,
    tokenizer: Tokenizer,
    meta: Mapping[str, Any],
    values: Mapping[str, Any] | None = None,
    shards: Iterable[Shard] = (),
) -> None:
    """Write a checkpoint from one process and return when it is complete.

    Raises:
        StoreError: it cannot be written.
    """
    with CheckpointWriter(store, retry_seconds=()) as writer:
        writer.save(ref, model=model, tokenizer=tokenizer, meta=meta, values=values, shards=shards)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        safetensors.torch.save_file(dict(tensors), path)
    except SafetensorError as error:
        raise StoreError(f"{path} cannot be written: {error}") from error
