"""Readers of the store see which program holds a lease."""

import json
from pathlib import Path

import pytest

from nanochat_core.store import LEASE_SECONDS, FolderStore, Lease, LeaseWatch, lease

NAME = "models/demo"


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def test_the_holder_is_named_until_its_end(store: FolderStore) -> None:
    watch = LeaseWatch(store, NAME)
    assert watch.program() == ""
    with Lease(store, NAME, "jobs.train.pretrain"):
        assert watch.program() == "jobs.train.pretrain"
    assert watch.program() == ""


def test_a_holder_of_another_machine_that_renews_nothing_is_no_longer_named(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_machine", lambda: "another machine")
    held = Lease(store, NAME, "jobs.train.sft")
    held._take()
    monkeypatch.undo()
    now = 0.0
    watch = LeaseWatch(store, NAME, clock=lambda: now)
    assert watch.program() == "jobs.train.sft"
    now = LEASE_SECONDS - 1
    assert watch.program() == "jobs.train.sft"
    now = LEASE_SECONDS
    assert watch.program() == ""
    held.renew()
    assert watch.program() == "jobs.train.sft"


def test_a_dead_holder_of_this_machine_is_not_named(store: FolderStore) -> None:
    Lease(store, NAME, "jobs.train.sft")._take()
    assert LeaseWatch(store, NAME).program() == "jobs.train.sft"
    (path,) = store.root.rglob("demo.json")
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"process_start": stored["process_start"] + 1}))
    assert LeaseWatch(store, NAME).program() == ""


def test_a_damaged_lease_names_nobody(store: FolderStore) -> None:
    store.write(f"leases/{NAME}.json", b"[]")
    assert LeaseWatch(store, NAME).program() == ""
