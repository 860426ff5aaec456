"""Artifacts of other versions: files of an older version are read; files of a newer version are refused."""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.data.origin import read_origin
from jobs.data.shards import TextDataset, dataset_digest, read_manifest
from jobs.data.tokenizers import check_replaceable, load_tokenizer, trained_on
from jobs.promotion.decisions import decisions, last_promotion
from jobs.results.evaluations import Evaluation, results_of
from jobs.results.reports import read_report
from nanochat_core.checkpoint import (
    CheckpointRef,
    DamagedCheckpoint,
    check_formats,
    load_checkpoint,
    load_meta,
    load_trainer_state,
    newest_checkpoint,
    promoted,
)
from nanochat_core.errors import UserError
from nanochat_core.formats import NewerFormatError, with_format, without_format
from nanochat_core.model import GPT
from nanochat_core.store import FolderStore, Store
from nanochat_core.training.checkpoint_writer import save_checkpoint
from tests.support.released_store import CONFIG, DOCUMENTS, MOMENTUM, NAME, REF, RUN, TOKENIZER, write_store

RELEASED = sorted((Path(__file__).parents[1] / "data" / "stores").glob("*.zip"))


@pytest.fixture(params=["this version", *RELEASED], ids=lambda made: getattr(made, "stem", made))
def released(request: pytest.FixtureRequest, tmp_path: Path) -> FolderStore:
    """A store that was written by one version: each test runs for every released version and for this version."""
    store = FolderStore(tmp_path / "store")
    if isinstance(request.param, Path):
        with zipfile.ZipFile(request.param) as packed:
            packed.extractall(store.root)
    else:
        write_store(store)
    return store


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    store = FolderStore(tmp_path / "store")
    write_store(store)
    return store


def digests(store: Store) -> dict[str, str]:
    return {key: hashlib.sha256(store.read(key)).hexdigest() for top in TOPS for key in store.keys(top)}


TOPS = ("data", "tokenizers", "models", "evaluations", "reports", "leases")


def test_every_artifact_of_every_released_version_is_read(released: FolderStore) -> None:
    before = digests(released)
    checkpoint = newest_checkpoint(released, NAME, "base")
    assert checkpoint is not None
    assert (checkpoint.ref, checkpoint.config, checkpoint.tokenizer.digest) == (REF, CONFIG, TOKENIZER.digest)
    assert checkpoint.meta["history"] == load_meta(released, REF)["history"] == RUN["history"]
    checkpoint.build_model()
    check_formats(released, REF)
    trainer = load_trainer_state(released, REF)
    momentum = trainer.read("momentum", 0, 3)
    assert trainer.values["run"] == RUN
    assert momentum is not None
    assert torch.equal(momentum, MOMENTUM)
    assert promoted(released, NAME) == REF
    manifest = read_manifest(released, NAME)
    assert manifest is not None
    assert (manifest.complete, manifest.source) == (True, "a test")
    assert list(TextDataset(released, NAME, "train")) == DOCUMENTS
    assert load_tokenizer(released, NAME).digest == TOKENIZER.digest
    assert trained_on(released, NAME) == dataset_digest(released, NAME)
    origin = read_origin(released, NAME)
    assert origin is not None
    assert origin["recipe"] == "small"
    (result,) = results_of(released, REF, checkpoint.weights_digest)
    assert result["core"] == 0.1
    assert Evaluation.of(released, checkpoint, "core", {"bundle": "0"}).result() == result
    (decision,) = decisions(released, REF)
    assert last_promotion(released, NAME) == (REF, decision)
    assert decision.metrics["core.core"].value == 0.1
    report = read_report(released, NAME)
    assert report is not None
    assert report["revision"] == REF.revision
    assert digests(released) == before


def change(store: FolderStore, key: str, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit a JSON file as if a newer version had written it. A checkpoint's manifest gets the new size and digest."""
    path = store.root / key
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    if key.startswith(f"{REF.prefix}/") and not key.endswith("MANIFEST.json"):
        data = path.read_bytes()
        entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest = f"{REF.prefix}/MANIFEST.json"
        change(store, manifest, lambda stored: stored["files"].update({key.removeprefix(f"{REF.prefix}/"): entry}))


def raised(content: dict[str, Any]) -> None:
    content["format"] = "nanochat-bpe/2" if isinstance(content.get("format"), str) else content.get("format", 1) + 1


def unknown(content: dict[str, Any]) -> None:
    content["invented_later"] = 1


READERS: dict[str, Callable[[Store], object]] = {
    f"{REF.prefix}/MANIFEST.json": lambda store: load_checkpoint(store, REF),
    f"{REF.prefix}/config.json": lambda store: load_checkpoint(store, REF),
    f"{REF.prefix}/tokenizer.json": lambda store: load_checkpoint(store, REF),
    f"{REF.prefix}/meta.json": lambda store: load_checkpoint(store, REF),
    f"{REF.prefix}/optim/state.json": lambda store: load_trainer_state(store, REF),
    f"data/{NAME}/dataset.json": lambda store: read_manifest(store, NAME),
    f"data/{NAME}/origin.json": lambda store: read_origin(store, NAME),
    f"tokenizers/{NAME}/tokenizer.json": lambda store: check_replaceable(store, NAME),
    f"tokenizers/{NAME}/meta.json": lambda store: check_replaceable(store, NAME),
    f"evaluations/{NAME}/base/step_000004/core/result.json": lambda store: results_of(store, REF, ""),
    f"reports/{NAME}/report.json": lambda store: read_report(store, NAME),
    f"reports/{NAME}/decisions/base_step_000004.json": lambda store: decisions(store, REF),
}
# Every field of these files matters. In all other files, a reader ignores unknown fields.
EXACT = ("MANIFEST.json", "config.json", "tokenizer.json", "state.json", "dataset.json")


@pytest.mark.parametrize("key", READERS)
def test_a_newer_format_is_refused_by_the_name_of_the_file(store: FolderStore, key: str) -> None:
    change(store, key, raised)
    with pytest.raises(NewerFormatError, match=rf"{key} has format \d, and this version of nanochat reads at most \d"):
        READERS[key](store)


@pytest.mark.parametrize("key", READERS)
def test_an_unknown_field_is_refused_where_every_field_matters(store: FolderStore, key: str) -> None:
    change(store, key, unknown)
    if key.endswith(EXACT):
        with pytest.raises(NewerFormatError, match=f"{key} has the unknown field 'invented_later'"):
            READERS[key](store)
    else:
        READERS[key](store)


@pytest.mark.parametrize("key", [key for key in READERS if key.startswith("models")])
def test_a_checkpoint_of_a_newer_version_is_neither_skipped_nor_replaced_nor_deleted(
    store: FolderStore, key: str
) -> None:
    change(store, key, raised)
    before = digests(store)
    with pytest.raises(NewerFormatError):
        check_formats(store, REF)
    if not key.endswith("state.json"):
        with pytest.raises(NewerFormatError):
            newest_checkpoint(store, NAME, "base")
    if key.endswith("MANIFEST.json"):
        with pytest.raises(UserError, match="newer version"):
            save_checkpoint(store, REF, model=GPT(CONFIG), tokenizer=TOKENIZER, meta={})
    assert digests(store) == before


def test_damage_is_told_apart_from_another_version(store: FolderStore) -> None:
    (store.root / REF.prefix / "config.json").write_text('{"format": 2}')
    with pytest.raises(DamagedCheckpoint, match=r"config\.json has 13 bytes"):
        load_checkpoint(store, REF)
    assert newest_checkpoint(store, NAME, "base") is None
    check_formats(store, REF)
    with pytest.raises(DamagedCheckpoint, match="there is no checkpoint"):
        load_checkpoint(store, CheckpointRef(NAME, "base", 5))


NEWER = [f"{REF.prefix}/{name}" for name in ("tokenizer.json", "meta.json", "optim/state.json")]


@pytest.mark.parametrize("key", NEWER)
def test_a_damaged_file_hides_no_newer_one(store: FolderStore, key: str) -> None:
    change(store, key, raised)
    (store.root / REF.prefix / "config.json").write_text("damaged")
    with pytest.raises(NewerFormatError, match=f"{key} has format"):
        check_formats(store, REF)


def test_a_file_without_a_format_has_format_1() -> None:
    assert without_format({"a": 1}, 1, "x") == without_format(with_format({"a": 1}, 1), 1, "x") == {"a": 1}


@pytest.mark.parametrize("version", [0, -1, 1.0, "1", None, True, [1]])
def test_a_format_that_is_no_number_is_damage(version: Any) -> None:
    with pytest.raises(ValueError, match="no version number"):
        without_format({"format": version}, 1, "x")
