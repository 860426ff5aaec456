"""Tokenizers in the artifact store: ``tokenizers/<name>/tokenizer.json``. ``meta.json`` names the training text."""

import json

from jobs.data.shards import dataset_digest, shard_keys
from nanochat_core.errors import UserError
from nanochat_core.formats import NewerFormatError, with_format, without_format
from nanochat_core.store import Store
from nanochat_core.tokenizer import Tokenizer

_META_FORMAT = 1


def tokenizer_key(name: str) -> str:
    """The key of a tokenizer's file in the store."""
    return f"tokenizers/{name}/tokenizer.json"


def save_tokenizer(store: Store, name: str, tokenizer: Tokenizer, dataset: str) -> None:
    """Write a tokenizer, and the name and digest of the dataset that it was trained on."""
    store.write(tokenizer_key(name), tokenizer.to_json().encode())
    meta = with_format({"dataset": dataset_digest(store, dataset), "dataset_name": dataset}, _META_FORMAT)
    store.write(_meta_key(name), (json.dumps(meta, indent=2) + "\n").encode())


def load_tokenizer(store: Store, name: str) -> Tokenizer:
    """Read a trained tokenizer. Raises UserError if the store has no tokenizer of this name or cannot read it."""
    try:
        return Tokenizer.from_json(store.read(tokenizer_key(name)), tokenizer_key(name))
    except FileNotFoundError:
        raise UserError(
            f"there is no tokenizer {name!r} in {store}; train it with python -m jobs.train.tokenizer"
        ) from None


def check_replaceable(store: Store, name: str) -> None:
    """Raise NewerFormatError if a newer version of nanochat wrote the tokenizer of this name, or its ``meta.json``.

    Raises UserError if ``meta.json`` is damaged.
    """
    _meta(store, name)
    try:
        load_tokenizer(store, name)
    except NewerFormatError:
        raise
    except UserError:
        return  # A missing or damaged tokenizer may be replaced.


def trained_on(store: Store, name: str) -> str | None:
    """The digest of the dataset that a tokenizer was trained on; None if the tokenizer or the digest is missing."""
    return _meta(store, name).get("dataset") if store.exists(tokenizer_key(name)) else None


def dataset_of(store: Store, name: str) -> str:
    """The name of the dataset that a tokenizer was trained on; empty if the dataset is unknown or not in the store."""
    dataset = _meta(store, name).get("dataset_name", "")
    return dataset if dataset and shard_keys(store, dataset) else ""


def _meta(store: Store, name: str) -> dict[str, str]:
    key = _meta_key(name)
    try:
        return without_format(json.loads(store.read(key)), _META_FORMAT, key)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{key} in {store} is damaged ({error}); delete it, or train the tokenizer again") from error


def _meta_key(name: str) -> str:
    return f"tokenizers/{name}/meta.json"
