"""A lease on a name of the store has one holder at a time, and is taken over only after the holder's death."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nanochat_core.errors import UserError
from nanochat_core.store import FolderStore, Lease, LeaseLost, NameInUse, StoreError, lease

NAME = "models/demo"
KEY = "leases/models/demo.json"


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


class Clock:
    """A clock that only :meth:`sleep` moves. Each function in ``at`` is called once, at the time in its key."""

    def __init__(self, **at: Callable[[], object]) -> None:
        self.now = 0.0
        self.at = {float(seconds.removeprefix("s")): call for seconds, call in at.items()}

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for due in [due for due in self.at if due <= self.now]:
            self.at.pop(due)()


def wanted(store: FolderStore, clock: Clock) -> Lease:
    return Lease(store, NAME, "second", seconds=60, clock=clock, sleep=clock.sleep)


@contextlib.contextmanager
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leases that are created in the ``with`` block seem to belong to another machine."""
    with monkeypatch.context() as patched:
        patched.setattr(lease, "_machine", lambda: "another machine")
        yield


def taken(store: FolderStore, monkeypatch: pytest.MonkeyPatch, seconds: float = 60) -> Lease:
    """A lease that another machine holds and never renews, as if the holder had died."""
    with elsewhere(monkeypatch):
        first = Lease(store, NAME, "first", seconds=seconds)
    first._take()
    return first


def test_a_lease_is_a_file_that_exists_only_while_it_is_held(store: FolderStore) -> None:
    with Lease(store, NAME, "first"):
        stored = json.loads(store.read(KEY))
        assert (stored["format"], stored["program"], stored["pid"]) == (1, "first", os.getpid())
    assert list(store.root.rglob("*")) == []
    with Lease(store, NAME, "first"), Lease(store, "models/demo2", "second"):
        pass
    assert list(store.root.rglob("*")) == []


def test_a_program_of_this_machine_that_is_alive_is_named_at_once(store: FolderStore) -> None:
    clock = Clock()
    with (
        Lease(store, NAME, "jobs.train.pretrain"),
        pytest.raises(NameInUse, match=rf"^jobs\.train\.pretrain \(process {os.getpid()} on .*\) is writing {NAME} in"),
        wanted(store, clock),
    ):
        pytest.fail("two programs got one name")
    assert clock.now == 0
    with wanted(store, clock):
        pass


HOLD = """
import sys, time
from nanochat_core.store import Lease, open_store
with Lease(open_store(sys.argv[1]), sys.argv[2], "held"):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(store: FolderStore) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(store), NAME], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_after_kill_9_on_this_machine_nobody_waits(store: FolderStore) -> None:
    process = holder(store)
    clock = Clock()
    with pytest.raises(NameInUse, match="held"), wanted(store, clock):
        pytest.fail("two programs got one name")
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with wanted(store, clock):  # the dead process is a zombie
        assert json.loads(store.read(KEY))["program"] == "second"
    process.wait()
    assert clock.now == 0


@pytest.mark.parametrize(
    ("content", "seconds"),
    [
        (b'{"token": "x", "seconds": 1e308}', 60),
        (b'{"token": "x", "seconds": Infinity}', 60),
        (b'{"token": "x", "seconds": NaN}', 60),
        (b'{"token": "x", "seconds": "5"}', 60),
        (b'{"pid": "x", "seconds": -5, "machine": [1]}', 60),
        (b"[1]", 60),
        (b"\xff\xfe", 60),
    ],
)
def test_a_damaged_lease_is_watched_for_a_bounded_time(store: FolderStore, content: bytes, seconds: float) -> None:
    store.write(KEY, content)
    clock = Clock()
    with wanted(store, clock):
        assert seconds <= clock.now < 1.05 * seconds


def test_a_dead_holder_of_another_machine_is_followed_when_its_lease_ends(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = taken(store, monkeypatch)
    clock = Clock()
    with wanted(store, clock) as second:
        assert 60 <= clock.now < 63
        with pytest.raises(LeaseLost, match=r"second \(process \d+ on .*\) has taken over models/demo"):
            first.renew()
        with pytest.raises(LeaseLost):
            first.check()
        second.check()
        second.renew()


def test_a_holder_that_renews_is_seen_to_be_alive(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = taken(store, monkeypatch)
    clock = Clock(s50=first.renew)
    with pytest.raises(NameInUse, match="first"), wanted(store, clock):
        pytest.fail("two programs got one name")
    assert 50 <= clock.now < 53
    first.renew()


def test_the_lease_lasts_as_long_as_its_holder_said(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    taken(store, monkeypatch, seconds=600)
    clock = Clock()
    with wanted(store, clock):
        assert clock.now >= 600


def test_a_holder_that_releases_while_another_program_watches_is_followed_at_once(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = taken(store, monkeypatch)
    clock = Clock(s10=lambda: first.__exit__(None, None, None))
    with wanted(store, clock):
        assert 10 <= clock.now < 13


@pytest.mark.parametrize("content", [b"", b"null", b"[1]", b'{"format": 99, "seconds": "long"}', b"\xff"])
def test_a_lease_that_cannot_be_read_is_watched_like_any_other(store: FolderStore, content: bytes) -> None:
    store.write(KEY, content)
    clock = Clock(s30=lambda: store.write(KEY, content + b" "))
    with pytest.raises(NameInUse), wanted(store, clock):
        pytest.fail("two programs got one name")
    with wanted(store, clock):
        assert clock.now >= 90


def test_of_many_that_follow_a_dead_holder_one_gets_the_name(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken(store, monkeypatch)
    outcomes: list[str] = []
    all_tried = threading.Barrier(8)

    def follow() -> None:
        try:
            with wanted(store, Clock()):
                outcomes.append("took it")
                all_tried.wait(30)
        except NameInUse:
            outcomes.append("told")
            all_tried.wait(30)

    threads = [threading.Thread(target=follow) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["told"] * 7 + ["took it"]


def test_a_lease_is_renewed_in_the_background(store: FolderStore) -> None:
    with Lease(store, NAME, "first", seconds=0.06):
        contents = set()
        for _ in range(2000):
            contents.add(store.read(KEY))
            if len(contents) >= 3:
                break
            threading.Event().wait(0.005)
    assert len(contents) >= 3


def test_a_store_that_fails_for_a_while_costs_nobody_the_lease(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = taken(store, monkeypatch)
    with monkeypatch.context() as failing:

        def fail(*_arguments: object) -> None:
            raise StoreError("unreachable")

        failing.setattr(FolderStore, "replace", fail)
        with pytest.raises(StoreError, match="unreachable"):
            first.renew()
        first.check()
    first.renew()


def test_a_write_whose_answer_was_lost_is_no_other_holder(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = FolderStore.replace

    def deaf(self: FolderStore, key: str, data: bytes, version: str | None) -> None:
        monkeypatch.setattr(FolderStore, "replace", replace)
        replace(self, key, data, version)

    monkeypatch.setattr(FolderStore, "replace", deaf)
    with Lease(store, NAME, "first") as first:
        monkeypatch.setattr(FolderStore, "replace", deaf)
        first.renew()
        first.renew()


def test_a_removed_lease_is_written_again(store: FolderStore) -> None:
    with Lease(store, NAME, "first") as first:
        store.remove(KEY)
        first.renew()
        assert json.loads(store.read(KEY))["program"] == "first"


def test_a_name_that_is_no_key_is_refused(store: FolderStore) -> None:
    with pytest.raises(UserError, match=re.escape("'data/../x' is no key of the store")):
        Lease(store, "data/../x", "first")
