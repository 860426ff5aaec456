"""The contract of every artifact store. The test file of each kind of store provides the fixture ``store``."""

import re
import threading
from pathlib import Path

import pytest

from nanochat_core.errors import UserError
from nanochat_core.store import Store

LAST = "MANIFEST.json"
BYTES = bytes(range(256)) * 5000


def publish(store: Store, prefix: str, files: dict[str, bytes]) -> None:
    """Publishes ``files`` and a marker. The marker is added first but becomes visible last."""
    with store.publish(prefix, last=LAST) as folder:
        for name, data in {LAST: b"whole", **files}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def contents(store: Store, prefix: str) -> dict[str, bytes]:
    return {key.removeprefix(f"{prefix}/"): store.read(key) for key in store.keys(prefix)}


class StoreContract:
    """Base class with the tests of the contract. Pytest collects the tests through subclasses."""

    @pytest.mark.parametrize("data", [b"", b"text\n", BYTES])
    @pytest.mark.parametrize("key", ["file", "a/b/c.bin", "with space/ümläut+%2F&=.json"])
    def test_what_was_written_is_read_back(self, store: Store, key: str, data: bytes) -> None:
        store.write(key, data)
        assert store.exists(key)
        assert store.read(key) == data
        assert store.fetch(key).read_bytes() == data

    def test_writing_again_replaces(self, store: Store) -> None:
        store.write("a/file", b"a longer first version")
        assert store.fetch("a/file").read_bytes() == b"a longer first version"
        store.write("a/file", b"second")
        assert store.read("a/file") == b"second"
        assert store.fetch("a/file").read_bytes() == b"second"

    def test_a_created_file_appears_whole_or_not_at_all(self, store: Store) -> None:
        with store.create("a/file") as path:
            path.write_bytes(BYTES)
            assert not store.exists("a/file")
        assert store.read("a/file") == BYTES

        def fail() -> None:
            with store.create("a/file") as path:
                path.write_bytes(b"new")
                raise RuntimeError("power cut")

        with pytest.raises(RuntimeError, match="power cut"):
            fail()
        assert contents(store, "a") == {"file": BYTES}

    def test_a_file_is_replaced_only_in_the_version_that_was_seen(self, store: Store) -> None:
        first = store.replace("a/lease", b"1", None)
        assert first is not None
        assert store.read_version("a/lease") == (b"1", first)
        assert store.replace("a/lease", b"another", None) is None
        second = store.replace("a/lease", b"2", first)
        assert second is not None
        assert store.replace("a/lease", b"late", first) is None
        assert store.read_version("a/lease") == (b"2", second)
        store.remove_version("a/lease", first)
        assert store.read("a/lease") == b"2"
        store.remove_version("a/lease", second)
        store.remove_version("a/lease", second)
        assert not store.exists("a/lease")
        assert store.replace("a/lease", b"late", second) is None
        with pytest.raises(FileNotFoundError, match="a/lease"):
            store.read_version("a/lease")

    def test_of_many_that_replace_one_version_one_succeeds(self, store: Store) -> None:
        seen = store.replace("a/lease", b"seen", None)
        results: list[str | None] = []
        start = threading.Barrier(6)

        def write(number: int) -> None:
            start.wait()
            results.append(store.replace("a/lease", f"writer {number}".encode(), seen))

        writers = [threading.Thread(target=write, args=(number,)) for number in range(6)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        (version,) = [result for result in results if result is not None]
        assert store.read_version("a/lease")[1] == version

    @pytest.mark.parametrize("before", [None, b"an older version"])
    def test_an_incoming_file_is_seen_only_when_it_was_put(self, store: Store, before: bytes | None) -> None:
        if before is not None:
            store.write("data/d/shard", before)
        incoming = store.incoming("data/d") / "part"
        incoming.write_bytes(BYTES)
        assert store.keys("data") == ([] if before is None else ["data/d/shard"])
        assert store.incoming("data/d") == incoming.parent
        store.put("data/d/shard", incoming)
        assert contents(store, "data") == {"d/shard": BYTES}
        assert not incoming.exists()

    @pytest.mark.parametrize("key", ["missing", "folder/missing", "no/such/folder", "folder"])
    def test_what_is_no_file_is_not_found(self, store: Store, key: str) -> None:
        store.write("folder/file", b"x")
        assert not store.exists(key)
        with pytest.raises(FileNotFoundError, match=key):
            store.read(key)
        with pytest.raises(FileNotFoundError, match=key):
            store.fetch(key)

    @pytest.mark.parametrize(
        "key",
        ["../up", "a/../../up", "a/..", "/absolute", "", ".", "/", ".hidden", "a/.hidden/b", "a//b", "a/", "a/.", "\0"],
    )
    def test_keys_that_leave_the_root_or_are_hidden_are_refused(self, store: Store, key: str) -> None:
        def published() -> None:
            with store.publish(key, last=LAST):
                pytest.fail("a folder to write into was handed out")

        def created() -> None:
            with store.create(key):
                pytest.fail("a file to write was handed out")

        calls = (
            created,
            lambda: store.read(key),
            lambda: store.exists(key),
            lambda: store.write(key, b"x"),
            lambda: store.keys(key),
            lambda: store.fetch(key),
            lambda: store.delete(key),
            lambda: store.remove(key),
            published,
        )
        for call in calls:
            with pytest.raises(UserError, match=re.escape(f"{key!r} is no key")):
                call()

    def test_keys_lists_the_files_below_a_folder_sorted(self, store: Store) -> None:
        for key in ["m/b/2", "m/a", "m/b/10", "m/b/c/d", "m2/x", "n/m/x"]:
            store.write(key, b"")
        assert store.keys("m") == ["m/a", "m/b/10", "m/b/2", "m/b/c/d"]
        assert store.keys("m/b") == ["m/b/10", "m/b/2", "m/b/c/d"]

    def test_keys_of_a_file_or_of_nothing_are_none(self, store: Store) -> None:
        store.write("m/a", b"")
        assert store.keys("m/a") == []
        assert store.keys("nothing") == []

    def test_delete_removes_a_folder_and_nothing_beside_it(self, store: Store) -> None:
        for key in ["m/step_1/a", "m/step_1/b/c", "m/step_10/a", "m/step_1.txt"]:
            store.write(key, b"")
        store.delete("m/step_1")
        assert store.keys("m") == ["m/step_1.txt", "m/step_10/a"]

    def test_remove_removes_one_file_and_nothing_beside_it(self, store: Store) -> None:
        for key in ["m/a", "m/ab", "m/a.txt"]:
            store.write(key, b"")
        store.remove("m/a")
        store.remove("m/a")
        store.remove("nothing/a")
        assert store.keys("m") == ["m/a.txt", "m/ab"]

    def test_deleting_what_is_no_folder_does_nothing(self, store: Store) -> None:
        store.write("m/a", b"kept")
        store.delete("m/a")
        store.delete("m/b")
        store.delete("nothing")
        assert contents(store, "m") == {"a": b"kept"}

    def test_a_published_folder_holds_what_was_written_into_it(self, store: Store) -> None:
        files = {"model": BYTES, "optim/deep/er/state": b"s", "empty": b""}
        publish(store, "models/m/step_1", files)
        assert contents(store, "models/m/step_1") == {LAST: b"whole", **files}

    def test_publishing_again_leaves_no_file_of_the_old_folder(self, store: Store) -> None:
        publish(store, "p", {"both": b"old", "only_old": b"old", "folder/old": b"old"})
        publish(store, "p", {"both": b"new", "only_new": b"new"})
        assert contents(store, "p") == {LAST: b"whole", "both": b"new", "only_new": b"new"}

    def test_publishing_touches_nothing_beside_the_folder(self, store: Store) -> None:
        publish(store, "m/step_1", {"a": b"1"})
        publish(store, "m/step_10", {"a": b"10"})
        publish(store, "m/step_1", {"b": b"1"})
        assert contents(store, "m/step_10") == {LAST: b"whole", "a": b"10"}

    @pytest.mark.parametrize("before", [{}, {LAST: b"whole", "a": b"old"}])
    def test_a_publisher_that_fails_changes_nothing(self, store: Store, before: dict[str, bytes]) -> None:
        if before:
            publish(store, "p", {"a": b"old"})
        staging = Path()

        def fail() -> None:
            nonlocal staging
            with store.publish("p", last=LAST) as staging:
                (staging / "a").write_bytes(b"new")
                (staging / LAST).write_bytes(b"whole")
                raise RuntimeError("power cut")

        with pytest.raises(RuntimeError, match="power cut"):
            fail()
        assert contents(store, "p") == before
        assert not staging.exists()

    def test_a_folder_without_its_last_file_is_not_published(self, store: Store) -> None:
        publish(store, "p", {"a": b"old"})

        def forget() -> None:
            with store.publish("p", last=LAST) as folder:
                (folder / "a").write_bytes(b"new")

        with pytest.raises(FileNotFoundError, match=LAST):
            forget()
        assert contents(store, "p") == {LAST: b"whole", "a": b"old"}

    def test_who_sees_the_last_file_of_a_new_folder_sees_all_of_them(self, store: Store) -> None:
        folders, files = 12, {f"part_{i}": bytes([i]) * 2000 for i in range(4)}
        torn: list[str] = []
        done = threading.Event()

        def watch() -> None:
            for step in range(folders):
                while True:
                    over = done.is_set()  # read first, because the folder may come in the meantime
                    if store.exists(f"w/{step}/{LAST}"):
                        break
                    if over:
                        torn.append(f"{step} never came")
                        return
                if contents(store, f"w/{step}") != {LAST: b"whole", **files}:
                    torn.append(f"{step} was seen in parts")

        watchers = [threading.Thread(target=watch) for _ in range(2)]
        for watcher in watchers:
            watcher.start()
        for step in range(folders):
            publish(store, f"w/{step}", files)
        done.set()
        for watcher in watchers:
            watcher.join()
        assert torn == []

    def test_a_reader_of_a_file_that_is_being_replaced_gets_one_version_whole(self, store: Store) -> None:
        versions = [bytes([i]) * 50_000 for i in range(20)]
        store.write("file", versions[0])
        seen: set[bytes] = set()
        done = threading.Event()

        def watch() -> None:
            while True:
                seen.add(store.read("file"))
                if done.is_set():
                    return

        watcher = threading.Thread(target=watch)
        watcher.start()
        for version in versions:
            store.write("file", version)
        done.set()
        watcher.join()
        assert seen
        assert seen <= set(versions)
