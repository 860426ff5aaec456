"""Writes checkpoints in the background, from one or several ranks.

Training waits until the previous checkpoint is written and while tensors are copied to main memory. Hashing and
transfer happen in a thread. Each rank that has a share of the optimizer state writes it to one file. The first rank
also writes all other files. The manifest is written last; a checkpoint without a manifest is incomplete, and readers
ignore it.

A checkpoint may replace a complete checkpoint of the same name, for example after ``--no-resume``. An engine may be
reading the old checkpoint, so at every moment the store must have a complete checkpoint. S3 can neither rename files
nor replace several files in one step. The new files therefore get a new subfolder, and the new manifest names it:

1.  Write all files to ``replacement_<id>/``. The old manifest still lists the old files.
2.  Replace the manifest atomically, as every store can. The manifest now lists the new files.
3.  Remove the old files.

A writer that is killed leaves files that no manifest lists. The next writer of the same checkpoint removes them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from nanochat_core.checkpoint import CheckpointRef
from nanochat_core.checkpoint.loading import META_FORMAT, TRAINER_STATE_FORMAT
from nanochat_core.checkpoint.manifest import (
    CONFIG,
    META,
    TOKENIZER,
    TRAINER_STATE,
    WEIGHTS,
    DamagedCheckpoint,
    FileEntry,
    Manifest,
    load_manifest,
)
from nanochat_core.checkpoint.names import MANIFEST
from nanochat_core.errors import UserError
from nanochat_core.formats import with_format
from nanochat_core.model import GPT
from nanochat_core.store import Lease, Store, StoreError
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.distributed import ALONE, RankLost, Ranks
from nanochat_core.training.optim import Shard

log = logging.getLogger(__name__)

# Seconds to wait before each further attempt to write a checkpoint, if the store failed. If the last attempt fails too,
# its error is raised. Other errors are raised at once.
RETRY_SECONDS = (1.0, 5.0, 20.0)
# Maximum time that the ranks wait in the background for the transfer of the slowest rank.
_TRANSFER_SECONDS = 3600.0
# While a checkpoint is being written, seconds between two checks that the other ranks are alive.
_CHECK_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class _Contents:
    """The content of a checkpoint. It is a copy, because training may change the originals during the writing.

    ``weights`` has the model's weights on the first rank, and is empty on other ranks. ``texts`` has the content of
    each text file by file name. ``values`` has the trainer's values as JSON. ``shards`` is this rank's share of the
    optimizer state.
    """

    weights: dict[str, Tensor]
    texts: dict[str, str]
    values: str
    shards: list[Shard]


class CheckpointWriter:
    """Writes one checkpoint at a time. Every rank must call the same methods in the same order."""

    def __init__(
        self,
        store: Store,
        ranks: Ranks = ALONE,
        retry_seconds: Sequence[float] = RETRY_SECONDS,
        lease: Lease | None = None,
    ) -> None:
        """``lease`` is the first rank's lease on the model's name.

        If another run takes over the lease, no further checkpoint is completed or replaced.
        """
        self._store, self._retry_seconds, self._lease = store, retry_seconds, lease
        self._training_ranks = ranks
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
        """Waits until the previous checkpoint is written, copies the new content and starts to write the copy.

        Raises the same errors as :meth:`wait`.

        Args:
            model, tokenizer, meta: content that the first rank writes; these arguments of other ranks are ignored.
            values: JSON data of the first rank that training needs to resume; None makes resuming impossible.
            shards: this rank's share of the tensors that training needs to resume.
            then: called by the first rank, in the background, when the checkpoint is complete.
        """
        self.wait()
        contents = _Contents(
            weights={name: _copy(tensor) for name, tensor in model.state_dict().items()} if self._ranks.leads else {},
            texts={
                CONFIG: model.config.to_json(),
                TOKENIZER: tokenizer.to_json(),
                META: json.dumps(
                    with_format(dict(meta) | {"tokenizer_digest": tokenizer.digest}, META_FORMAT), indent=2
                )
                + "\n",
            },
            values=json.dumps(values),
            shards=[dataclasses.replace(shard, tensor=_copy(shard.tensor)) for shard in shards],
        )

        def write() -> None:
            try:
                self._write(ref, contents)
                if self._ranks.leads:
                    then()
            except BaseException as error:
                self._error = error  # the next call of wait() raises this error

        # The thread may wait for ranks that are lost. A daemon thread does not keep the process alive during such a
        # wait.
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until the last checkpoint is written. All ranks must call this at the same place.

        Raises RankLost if another rank does not answer within the timeout of training. The writing itself may take
        longer than this timeout. Raises StoreError if the checkpoint could not be written. Raises another UserError if
        the checkpoint must not be written: another run has taken over the model's name, or the checkpoint would replace
        one of a newer version of nanochat. On the first rank, an error of ``then`` is raised too. Earlier checkpoints
        stay complete.
        """
        if self._thread is not None:
            # All ranks call gather() again and again while they wait, because it raises RankLost if a rank hangs.
            while any(self._training_ranks.gather(self._writes_after(_CHECK_SECONDS))):
                pass
        self._end()

    def _writes_after(self, seconds: float) -> bool:
        assert self._thread is not None
        self._thread.join(seconds)
        return self._thread.is_alive()

    def _end(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        """Waits until the last checkpoint is written, unless a lost rank makes that impossible."""
        if kind is None:
            self.wait()
        elif not issubclass(kind, RankLost):
            with contextlib.suppress(UserError):  # the caller reports the error that ended the block
                # wait() is not called, because all ranks must call it together, and other ranks may have no error.
                self._end()

    def _write(self, ref: CheckpointRef, contents: _Contents) -> None:
        for wait in (*self._retry_seconds, None):
            try:
                self._write_once(ref, contents)
                break
            except StoreError as error:
                if wait is None:
                    raise
                log.warning(
                    "a checkpoint could not be written and is tried again",
                    extra={"checkpoint": ref.prefix, "reason": str(error), "wait_seconds": wait},
                )
                time.sleep(wait)

    def _write_once(self, ref: CheckpointRef, contents: _Contents) -> None:
        """Makes one attempt to write the checkpoint. A UserError on one rank is raised on every rank."""
        try:
            folder = self._on_every_rank(lambda: self._make_room(ref) if self._ranks.leads else None)[0]
            attempt = Manifest(ref, {}, folder)
            written = self._on_every_rank(lambda: self._write_share(attempt, contents))
            self._on_every_rank(lambda: self._complete(attempt, contents, written) if self._ranks.leads else None)
        except StoreError:
            if self._ranks.leads:
                with contextlib.suppress(UserError):
                    self._make_room(ref)
            raise

    def _on_every_rank(self, work: Callable[[], Any]) -> list[Any]:
        """Calls ``work`` on every rank and returns all results. A UserError on one rank is raised on every rank."""
        try:
            outcome = {"result": work()}
        except UserError as error:
            outcome = {"error": str(error), "store_failed": isinstance(error, StoreError)}
        outcomes = self._ranks.gather(outcome)
        for rank, outcome in enumerate(outcomes):
            if "error" in outcome:
                where = f"rank {rank}: " if self._ranks.size > 1 else ""
                raise (StoreError if outcome["store_failed"] else UserError)(where + outcome["error"])
        return [outcome["result"] for outcome in outcomes]

    def _make_room(self, ref: CheckpointRef) -> str:
        """Removes files that the manifest does not list. Returns the name of the next attempt's subfolder.

        The name is empty, which means no subfolder, if there is no complete checkpoint. Raises NewerFormatError if a
        newer version of nanochat wrote the manifest, and LeaseLost if another run has taken over the model's name.
        """
        self._renew_lease()
        try:
            manifest = load_manifest(self._store, ref)
        except DamagedCheckpoint:  # there is no complete checkpoint
            self._store.delete(ref.prefix)
            return ""
        listed = {f"{ref.prefix}/{MANIFEST}", *map(manifest.key, manifest.files)}
        for key in self._store.keys(ref.prefix):
            if key not in listed:
                self._store.remove(key)
        return f"replacement_{uuid.uuid4().hex[:8]}"

    def _write_share(self, attempt: Manifest, contents: _Contents) -> dict[str, Any] | None:
        if not contents.shards:
            return None
        name = f"optim/rank_{self._ranks.rank:05d}_of_{self._ranks.size:05d}.safetensors"
        with self._file(attempt, name) as path:
            _save_tensors({shard.name: shard.tensor for shard in contents.shards}, path)
        # This file has some consecutive rows of each named tensor. Maps the tensor's name to the index that the first
        # of these rows has in the whole tensor, and to the number of these rows.
        rows = {shard.name: (shard.start, shard.tensor.size(0)) for shard in contents.shards}
        return {"name": name, "entry": dataclasses.asdict(attempt.files[name]), "rows": rows}

    def _complete(self, attempt: Manifest, contents: _Contents, written: list[dict[str, Any] | None]) -> None:
        shares = [share for share in written if share is not None]
        attempt.files.update({share["name"]: FileEntry(**share["entry"]) for share in shares})
        texts, values = dict(contents.texts), json.loads(contents.values)
        if values is not None:
            index = {share["name"]: share["rows"] for share in shares}
            texts[TRAINER_STATE] = json.dumps(with_format({"values": values, "tensors": index}, TRAINER_STATE_FORMAT))
        for name, text in texts.items():
            with self._file(attempt, name) as path:
                path.write_text(text)
        with self._file(attempt, WEIGHTS) as path:
            _save_tensors(contents.weights, path)
        self._renew_lease()
        attempt.write(self._store)
        if attempt.folder:
            self._make_room(attempt.ref)

    def _renew_lease(self) -> None:
        if self._lease is not None:
            self._lease.renew()

    @contextlib.contextmanager
    def _file(self, attempt: Manifest, name: str) -> Iterator[Path]:
        """Yields a path to write one file to. On exit, the file is added to the manifest of the attempt."""
        with self._store.create(attempt.key(name)) as path:
            yield path
            attempt.files[name] = FileEntry.of(path)


def save_checkpoint(
    store: Store,
    ref: CheckpointRef,
    *,
    model: GPT,
    tokenizer: Tokenizer,
    meta: Mapping[str, Any],
    values: Mapping[str, Any] | None = None,
    shards: Iterable[Shard] = (),
    lease: Lease | None = None,
) -> None:
    """Writes a checkpoint from a single process and returns when the checkpoint is complete.

    Raises StoreError if the checkpoint could not be written, and another UserError if it must not be written, as
    :meth:`CheckpointWriter.wait` does.
    """
    with CheckpointWriter(store, retry_seconds=(), lease=lease) as writer:
        writer.save(ref, model=model, tokenizer=tokenizer, meta=meta, values=values, shards=shards)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        safetensors.torch.save_file(dict(tensors), path)
    except SafetensorError as error:
        raise StoreError(f"{path} cannot be written: {error}") from error
