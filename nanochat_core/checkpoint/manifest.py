"""The manifest of a checkpoint: every file with its size and digest.

The manifest is written last, in one atomic step. A folder without a manifest is not a complete checkpoint. A file is
damaged if its size or digest differs from the manifest. Otherwise, the file has exactly the content that was written,
and does not count as damaged, even if this version of nanochat cannot read it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from nanochat_core.checkpoint.names import MANIFEST, CheckpointRef
from nanochat_core.errors import UserError
from nanochat_core.formats import with_format, without_format
from nanochat_core.store import Store, StoreError

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
META = "meta.json"
TRAINER_STATE = "optim/state.json"
FORMAT = 1


class DamagedCheckpoint(UserError):
    """A checkpoint is missing or damaged. Training may resume from an earlier checkpoint and replace the damaged one.

    No other error allows this replacement, because a checkpoint that this version cannot read may be undamaged.
    """


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """Size in bytes and hexadecimal SHA-256 of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        return cls(path.stat().st_size, sha256_of(path))


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The files of one checkpoint: an entry for each file name, such as ``model.safetensors``.

    ``folder`` is the name of the subfolder with the files. The name is empty, and there is no subfolder, unless the
    checkpoint replaced an earlier checkpoint of the same name.
    """

    ref: CheckpointRef
    files: dict[str, FileEntry]
    folder: str = ""

    @property
    def weights_digest(self) -> str:
        """The SHA-256 of the weights. Raises DamagedCheckpoint if the manifest lists no weights."""
        return self._entry(WEIGHTS).sha256

    def key(self, name: str) -> str:
        """The key of a file in the store."""
        return "/".join(filter(None, (self.ref.prefix, self.folder, name)))

    def fetch(self, store: Store, name: str) -> Path:
        """Verifies the size and the digest of a file and returns a local path to it.

        Raises DamagedCheckpoint if the file is missing or damaged, and StoreError if it cannot be read.
        """
        entry, key = self._entry(name), self.key(name)
        try:
            path = store.fetch(key)
            found = FileEntry.of(path)
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{key} is missing; the checkpoint is damaged") from None
        except OSError as error:
            raise StoreError(f"{key} in {store} cannot be read: {error.strerror or error}") from error
        if found.size != entry.size:
            raise DamagedCheckpoint(f"{key} has {found.size} bytes instead of {entry.size}; the checkpoint is damaged")
        if found.sha256 != entry.sha256:
            raise DamagedCheckpoint(f"{key} does not match its sha256 in the manifest; the checkpoint is damaged")
        return path

    def write(self, store: Store) -> None:
        """Writes the manifest. The checkpoint is then complete."""
        stored = {"folder": self.folder} if self.folder else {}
        files = {name: dataclasses.asdict(entry) for name, entry in self.files.items()}
        content = with_format(stored | {"files": files}, FORMAT)
        store.write(f"{self.ref.prefix}/{MANIFEST}", (json.dumps(content, indent=2) + "\n").encode())

    def _entry(self, name: str) -> FileEntry:
        if name not in self.files:
            raise DamagedCheckpoint(f"{self.ref.prefix}/{MANIFEST} does not list {name}; the checkpoint is damaged")
        return self.files[name]


def load_manifest(store: Store, ref: CheckpointRef) -> Manifest:
    """Reads the manifest of a checkpoint.

    Raises DamagedCheckpoint if the manifest is missing or damaged. Raises NewerFormatError if a newer version of
    nanochat wrote the manifest.
    """
    key = f"{ref.prefix}/{MANIFEST}"
    try:
        stored = without_format(json.loads(store.read(key)), FORMAT, key, known=("files", "folder"))
        files = {name: FileEntry(entry["size"], entry["sha256"]) for name, entry in stored["files"].items()}
        folder = stored.get("folder", "")
        if not isinstance(folder, str):
            raise TypeError(f"its folder is {folder!r}")
        return Manifest(ref, files, folder)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"there is no checkpoint {ref.prefix} in {store}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{key} is damaged: {error!r}") from error


def weights_digest(store: Store, ref: CheckpointRef) -> str:
    """The SHA-256 of a checkpoint's weights according to its manifest; the weights are not read."""
    return load_manifest(store, ref).weights_digest


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
