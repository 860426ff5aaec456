"""Checkpoints: loading returns exactly the saved bits, and the error for a damaged file names the file."""

import contextlib
import hashlib
import json
import logging
import math
import pickle
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from nanochat_core.checkpoint import (
    CheckpointRef,
    TrainerState,
    check_model_name,
    list_checkpoints,
    load_checkpoint,
    load_meta,
    load_trainer_state,
    newest_checkpoint,
    promote,
    promoted,
    withdraw,
)
from nanochat_core.checkpoint.names import MANIFEST
from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.store import FolderStore, StoreError
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.checkpoint_writer import save_checkpoint
from nanochat_core.training.optim import Shard

MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json", "meta.json")
TRAINER_FILES = ("optim/rank_00000_of_00001.safetensors", "optim/state.json")
REF = CheckpointRef("tiny", "sft", 40)
META = {"settings": {"depth": 1}, "history": [{"loss": 0.1 + 0.2}], "unit": "µs"}
VALUES = {"step": 40, "loader": {"epoch": 1, "ids": [1, 2]}, "loss": 1e-7}
SHARDS = [
    Shard("momentum", torch.arange(6.0).view(2, 3).T, 0, 3),
    Shard("generator", torch.arange(9, dtype=torch.uint8), 0, 9),
]


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def tokenizer(words: tuple[bytes, ...] = (b"he", b"ll")) -> Tokenizer:
    return Tokenizer([*(bytes([i]) for i in range(256)), *words])


def tiny_model(seed: int = 0, vocab_size: int = 267, dtype: torch.dtype = torch.float32) -> GPT:
    model = GPT(ModelConfig.from_depth(1, vocab_size=vocab_size, head_dim=32, context_length=16), dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.copy_(drawn)
    return model


def save(store: FolderStore, ref: CheckpointRef = REF, *, resumable: bool = True, seed: int = 0) -> None:
    trainer: dict[str, Any] = {"values": VALUES, "shards": SHARDS} if resumable else {}
    save_checkpoint(store, ref, model=tiny_model(seed), tokenizer=tokenizer(), meta=META, **trainer)


def load_trainer(store: FolderStore, ref: CheckpointRef) -> TrainerState:
    """The trainer state with all of its tensors verified."""
    state = load_trainer_state(store, ref)
    state.fetch(shard.name for shard in SHARDS)
    return state


def folder(store: FolderStore, ref: CheckpointRef = REF) -> Path:
    return store.root / ref.prefix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_saved_is_loaded_bit_for_bit(store: FolderStore, dtype: torch.dtype) -> None:
    model = tiny_model(3, dtype=dtype)
    save_checkpoint(store, REF, model=model, tokenizer=tokenizer(), meta=META)
    loaded = load_checkpoint(store, REF)
    stored = model.state_dict()
    assert loaded.weights.keys() == stored.keys()
    for name, tensor in stored.items():
        assert loaded.weights[name].dtype == tensor.dtype
        assert torch.equal(loaded.weights[name], tensor)
    assert loaded.ref == REF
    assert loaded.config == model.config
    assert loaded.meta == META | {"tokenizer_digest": tokenizer().digest}
    assert loaded.tokenizer.digest == tokenizer().digest


def test_meta_is_read_without_the_weights_but_verified(store: FolderStore) -> None:
    save(store)
    (store.root / REF.prefix / "model.safetensors").unlink()
    assert load_meta(store, REF) == META | {"tokenizer_digest": tokenizer().digest}
    meta = store.root / REF.prefix / "meta.json"
    meta.write_bytes(meta.read_bytes().replace(b"1", b"2"))
    with pytest.raises(UserError, match=r"meta\.json does not match its sha256"):
        load_meta(store, REF)
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_meta(store, CheckpointRef("other", "base", 1))


def test_the_built_model_computes_the_same(store: FolderStore) -> None:
    model, ids = tiny_model(), torch.arange(12).view(2, 6)
    save(store)
    built = load_checkpoint(store, REF).build_model()
    assert not built.training
    with torch.no_grad():
        assert torch.equal(built(ids), model(ids))
    fast = load_checkpoint(store, REF).build_model(compute_dtype=torch.bfloat16)
    assert fast.embedding.weight.dtype == torch.bfloat16


def test_trainer_state_comes_back(store: FolderStore) -> None:
    save(store)
    loaded = load_trainer(store, REF)
    assert loaded.values == VALUES
    for shard in SHARDS:
        read = loaded.read(shard.name, 0, shard.rows)
        assert read is not None
        assert read.dtype == shard.tensor.dtype
        assert torch.equal(read, shard.tensor)
    assert loaded.read("never stored", 0, 1) is None


def test_a_checkpoint_without_trainer_state_says_so(store: FolderStore) -> None:
    save(store, resumable=False)
    with pytest.raises(UserError, match=r"tiny/sft/step_000040 holds no optimizer state"):
        load_trainer_state(store, REF)
    assert not (folder(store) / "optim").exists()


def test_the_manifest_lists_every_other_file_with_size_and_digest(store: FolderStore) -> None:
    save(store)
    listed = json.loads((folder(store) / MANIFEST).read_text())["files"]
    assert sorted(listed) == sorted((*MODEL_FILES, *TRAINER_FILES))
    for name, entry in listed.items():
        data = (folder(store) / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert load_checkpoint(store, REF).digests == {name: entry["sha256"] for name, entry in listed.items()}


def test_files_are_in_formats_that_cannot_execute(store: FolderStore) -> None:
    save(store)
    for path in folder(store).rglob("*"):
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.is_file():
            safetensors.torch.load_file(path)
    assert {path.suffix for path in folder(store).rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_a_checkpoint_exists_only_once_it_is_complete(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest is written last, and no reader sees the checkpoint before that."""
    written: list[str] = []
    create = FolderStore.create

    def noted(self: FolderStore, key: str) -> contextlib.AbstractContextManager[Path]:
        written.append(key.removeprefix(f"{REF.prefix}/"))
        assert list_checkpoints(store, "tiny", "sft") == []
        with pytest.raises(UserError, match="there is no checkpoint"):
            load_checkpoint(store, REF)
        return create(self, key)

    monkeypatch.setattr(FolderStore, "create", noted)
    save(store)
    assert written[-1] == MANIFEST
    assert sorted(written[:-1]) == sorted((*MODEL_FILES, *TRAINER_FILES))
    assert list_checkpoints(store, "tiny", "sft") == [REF]


def test_saving_that_fails_leaves_the_old_checkpoint(store: FolderStore) -> None:
    save(store)
    with pytest.raises(TypeError, match="JSON serializable"):
        save_checkpoint(store, REF, model=tiny_model(9), tokenizer=tokenizer(), meta={"bad": object()})
    assert torch.equal(load_checkpoint(store, REF).weights["head.weight"], tiny_model(0).head.weight)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def flip_first(path: Path) -> None:
    flip(path, 0)


def flip_middle(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def flip_last(path: Path) -> None:
    flip(path, path.stat().st_size - 1)


def flip(path: Path, position: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= bit
    path.write_bytes(bytes(data))


def turn_into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def strike_from_manifest(path: Path) -> None:
    manifest = next(parent / MANIFEST for parent in path.parents if (parent / MANIFEST).exists())
    stored = json.loads(manifest.read_text())
    del stored["files"][path.relative_to(manifest.parent).as_posix()]
    manifest.write_text(json.dumps(stored))


DAMAGES = [
    truncate,
    empty,
    lengthen,
    flip_first,
    flip_middle,
    flip_last,
    Path.unlink,
    turn_into_folder,
    strike_from_manifest,
]


@pytest.mark.parametrize("name", [*MODEL_FILES, *TRAINER_FILES])
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_to_a_file_is_refused_by_its_name(
    store: FolderStore, name: str, damage: Callable[[Path], None]
) -> None:
    save(store)
    damage(folder(store) / name)
    load = load_trainer if name in TRAINER_FILES else load_checkpoint
    if damage is strike_from_manifest and name == "optim/state.json":
        expected = "holds no optimizer state"
    else:
        expected = name.replace(".", r"\.")
    with pytest.raises(UserError, match=expected) as refused:
        load(store, REF)
    assert REF.prefix in str(refused.value)


def test_a_file_of_another_size_is_told_with_both_sizes(store: FolderStore) -> None:
    save(store)
    path = folder(store) / "meta.json"
    size = path.stat().st_size
    truncate(path)
    with pytest.raises(
        UserError, match=rf"meta\.json has {size - 1} bytes instead of {size}; the checkpoint is damaged"
    ):
        load_checkpoint(store, REF)


def test_no_flipped_bit_of_the_manifest_goes_unnoticed_or_crashes(store: FolderStore) -> None:
    """Loading fails unless the flipped bit is in whitespace or in the entry of a file that is not loaded."""
    save(store, resumable=False)
    manifest = folder(store) / MANIFEST
    original, weights = manifest.read_bytes(), load_checkpoint(store, REF).weights
    survived = 0
    for position in range(0, len(original), 3):
        flip(manifest, position, 1 << position % 8)
        with contextlib.suppress(UserError):
            loaded = load_checkpoint(store, REF)
            survived += 1
            assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in weights.items())
        manifest.write_bytes(original)
    assert survived < len(original) / 3 / 10


DAMAGED_ENTRIES: list[Any] = [{}, {"size": 1}, [], "x"]


@pytest.mark.parametrize(
    "manifest",
    [b"", b"null", b"[]", b"{}", b"{", b"\xff\xfe", b'{"files": 5}', b'{"files": []}', b'{"files": {"model": 1}}']
    + [json.dumps({"files": {"model.safetensors": entry}}).encode() for entry in DAMAGED_ENTRIES],
)
def test_a_damaged_manifest_is_named(store: FolderStore, manifest: bytes) -> None:
    save(store)
    (folder(store) / MANIFEST).write_bytes(manifest)
    for load in (load_checkpoint, load_trainer):
        with pytest.raises(UserError, match=rf"{REF.prefix}/{MANIFEST}"):
            load(store, REF)


def rewrite(store: FolderStore, name: str, data: bytes) -> None:
    """Replaces a file and its entry in the manifest."""
    (folder(store) / name).write_bytes(data)
    manifest = json.loads((folder(store) / MANIFEST).read_text())
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder(store) / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", [*MODEL_FILES, *TRAINER_FILES])
def test_files_that_match_the_manifest_but_are_none_of_ours_are_refused(store: FolderStore, name: str) -> None:
    save(store)
    rewrite(store, name, pickle.dumps({"step": 1}))
    load = load_trainer if name in TRAINER_FILES else load_checkpoint
    with pytest.raises(UserError):
        load(store, REF)


def test_a_tokenizer_of_another_size_does_not_belong_to_the_model(store: FolderStore) -> None:
    save(store)
    rewrite(store, "tokenizer.json", tokenizer((b"he",)).to_json().encode())
    with pytest.raises(UserError, match=f"{REF.prefix}: the tokenizer has 266 ids but the model has 267"):
        load_checkpoint(store, REF)


def test_weights_of_another_shape_do_not_fit(store: FolderStore) -> None:
    save(store)
    other = ModelConfig.from_depth(2, vocab_size=267, head_dim=32, context_length=16)
    rewrite(store, "config.json", other.to_json().encode())
    loaded = load_checkpoint(store, REF)
    with pytest.raises(UserError, match=rf"{REF.prefix}: the weights do not fit config\.json") as refused:
        loaded.build_model()
    assert "\n" not in str(refused.value)


def test_what_is_not_there_is_a_clear_error(store: FolderStore) -> None:
    for load in (load_checkpoint, load_trainer):
        with pytest.raises(UserError, match=f"there is no checkpoint {REF.prefix} in {store.root}"):
            load(store, REF)


def test_checkpoints_are_listed_in_order_of_their_steps(store: FolderStore) -> None:
    refs = [CheckpointRef("tiny", "sft", step) for step in (9, 1_000_000, 40, 200)]
    for ref in (*refs, CheckpointRef("tiny", "base", 7), CheckpointRef("tiny2", "sft", 8)):
        save(store, ref, resumable=False)
    (store.root / "models/tiny/sft/step_000300").mkdir()
    (store.root / "models/tiny/sft/notes.txt").write_text("no checkpoint")
    assert [ref.step for ref in list_checkpoints(store, "tiny", "sft")] == [9, 40, 200, 1_000_000]
    assert list_checkpoints(store, "tiny", "rl") == []


def test_the_newest_whole_checkpoint_is_used_and_damaged_ones_are_logged_by_name(
    store: FolderStore, caplog: pytest.LogCaptureFixture
) -> None:
    refs = [CheckpointRef("tiny", "base", step) for step in (1, 2, 3, 4)]
    for ref in refs:
        save(store, ref, resumable=False, seed=ref.step)
    flip_last(folder(store, refs[3]) / "model.safetensors")
    (folder(store, refs[2]) / "meta.json").unlink()
    with caplog.at_level(logging.WARNING):
        newest = newest_checkpoint(store, "tiny", "base")
    assert newest is not None
    assert newest.ref == refs[1]
    assert torch.equal(newest.weights["head.weight"], tiny_model(2).head.weight)
    logged = [(record.checkpoint, record.reason) for record in caplog.records]
    assert [checkpoint for checkpoint, _ in logged] == [refs[3].prefix, refs[2].prefix]
    assert "model.safetensors" in logged[0][1]
    assert "meta.json" in logged[1][1]


def test_without_a_whole_checkpoint_there_is_no_newest(store: FolderStore) -> None:
    assert newest_checkpoint(store, "tiny", "base") is None
    save(store, resumable=False)
    (folder(store) / MANIFEST).write_bytes(b"{}")
    assert newest_checkpoint(store, "tiny", "sft") is None


def test_a_store_that_fails_is_not_taken_for_damage(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a failing store counted as damage, a short network failure would make a run start over."""
    save(store)

    def unreachable(self: FolderStore, key: str) -> Path:
        raise StoreError("cannot be reached")

    monkeypatch.setattr(FolderStore, "fetch", unreachable)
    with pytest.raises(StoreError, match="cannot be reached"):
        newest_checkpoint(store, "tiny", "sft")


@pytest.mark.parametrize("limit", [20_000, 2_000, 0])
def test_a_disk_that_fills_up_is_a_clear_error_and_leaves_the_checkpoints_before(
    store: FolderStore, limit: int
) -> None:
    save(store)
    files = sorted(store.root.rglob("*"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # the system refuses longer files
    try:
        with pytest.raises(StoreError, match=r"cannot be written: .*File too large"):
            save(store, CheckpointRef("tiny", "sft", 50), seed=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(store.root.rglob("*")) == files
    assert torch.equal(load_checkpoint(store, REF).weights["head.weight"], tiny_model(0).head.weight)


def test_readers_see_whole_checkpoints_while_new_ones_are_saved_and_old_ones_deleted(store: FolderStore) -> None:
    save(store, CheckpointRef("tiny", "base", 0), resumable=False)
    seen: set[int] = set()
    failed: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            over = False
            while not over:
                over = done.is_set()  # the last checkpoint stays, so the last turn sees it
                newest = newest_checkpoint(store, "tiny", "base")
                if newest is not None:  # all listed checkpoints may have been deleted in the meantime
                    step = newest.ref.step
                    assert torch.equal(newest.weights["head.weight"], tiny_model(step).head.weight)
                    seen.add(step)
        except BaseException as error:
            failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(1, 25):
        save(store, CheckpointRef("tiny", "base", step), resumable=False, seed=step)
        store.delete(CheckpointRef("tiny", "base", step - 1).prefix)
    done.set()
    reader.join()
    assert failed == []
    assert seen


def test_the_promoted_checkpoint_is_the_last_one_promoted(store: FolderStore) -> None:
    assert promoted(store, "tiny") is None
    promote(store, REF)
    promote(store, CheckpointRef("tiny", "rl", 7))
    assert promoted(store, "tiny") == CheckpointRef("tiny", "rl", 7)
    assert store.read("models/tiny/PROMOTED") == b"rl/step_000007\n"
    assert promoted(store, "other") is None
    withdraw(store, "tiny")
    assert promoted(store, "tiny") is None


@pytest.mark.parametrize("stored", [b"", b"\xff\xfe\x00", b"step_3", b"sft/step_x", b"sft/step_1\nsft/step_2"])
def test_a_damaged_promotion_is_a_clear_error(store: FolderStore, stored: bytes) -> None:
    store.write("models/tiny/PROMOTED", stored)
    with pytest.raises(UserError, match="names no checkpoint"):
        promoted(store, "tiny")


@pytest.mark.parametrize("ref", [REF, CheckpointRef("m", "base", 0), CheckpointRef("m", "rl", 12_345_678)])
def test_a_revision_parses_to_its_ref(ref: CheckpointRef) -> None:
    assert CheckpointRef.parse(ref.model, ref.revision) == ref
    assert ref.prefix == f"models/{ref.model}/{ref.revision}"


@pytest.mark.parametrize(
    "revision", ["", "sft", "sft/", "sft/step_", "sft/step_-1", "sft/40", "dpo/step_1", "sft/step_1/x", " sft/step_1"]
)
def test_what_is_no_revision_is_refused_with_an_example(revision: str) -> None:
    with pytest.raises(UserError, match=r"use <stage>/step_<n>, such as sft/step_000400"):
        CheckpointRef.parse("m", revision)


@pytest.mark.parametrize("name", ["a", "d12", "My-Model_2.1"])
def test_names_of_models(name: str) -> None:
    assert check_model_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "-a", ".a", "a b", "a\n", "ä"])
def test_what_cannot_name_a_model_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot name a model"):
        check_model_name(name)


def test_numbers_in_meta_keep_their_value(store: FolderStore) -> None:
    save_checkpoint(store, REF, model=tiny_model(), tokenizer=tokenizer(), meta={"x": 0.1 + 0.2, "inf": math.inf})
    meta = load_checkpoint(store, REF).meta
    assert (meta["x"], meta["inf"]) == (0.1 + 0.2, math.inf)


def test_another_tokenizer_of_the_same_size_is_refused(store: FolderStore) -> None:
    save(store, REF)
    rewrite(store, "tokenizer.json", tokenizer((b"he", b"lo")).to_json().encode())
    with pytest.raises(UserError, match=r"tokenizer\.json is not the tokenizer that the model was trained with"):
        load_checkpoint(store, REF)


def test_a_checkpoint_that_does_not_name_its_tokenizer_is_still_read(store: FolderStore) -> None:
    save(store, REF)
    rewrite(store, "meta.json", json.dumps(META).encode())
    assert load_checkpoint(store, REF).meta == META
