"""A shard is downloaded whole or not at all, even if the server, the network or the disk fails or the user stops."""

import hashlib
import json
import resource
import socket
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.data import download, http_download
from jobs.data.download import open_source
from jobs.data.shards import TextDataset, dataset_exists, read_manifest
from jobs.train import dataset
from jobs.train.dataset import shard_numbers, validate
from nanochat_core.errors import UserError, run_main
from nanochat_core.store import FolderStore, Store
from tests.support.odd_files import BAD, write
from tests.support.text_files import cut_parquet, damaged_parquet, no_text_column, not_parquet, write_parquet

SHARDS = 6


class Server:
    """Serves shards from memory. Each request for a file runs the next fault of that file, if there is one."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, bytes] = {}
        for i in range(SHARDS):
            path = write_parquet(folder / f"shard_{i:05d}.parquet", [f"text {i}.{j} {'x' * j}" for j in range(300)])
            self.files[f"/{path.name}"] = path.read_bytes()
        self.faults: dict[str, list[Callable[[BaseHTTPRequestHandler, bytes], bool]]] = defaultdict(list)
        self.ranges: dict[str, list[str | None]] = defaultdict(list)
        self.etags: dict[str, str] = {}
        self.supports_range = True
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.host = f"http://127.0.0.1:{self._http.server_port}"

    @property
    def template(self) -> str:
        return self.host + "/shard_{shard:05d}.parquet"

    def etag(self, path: str) -> str:
        return self.etags.get(path, f'"{hashlib.md5(self.files[path]).hexdigest()}"')

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.ranges[self.path].append(self.headers["Range"])
                body = server.files.get(self.path)
                if body is None:
                    self.send_error(404)
                    return
                faults = server.faults[self.path]
                if faults and faults.pop(0)(self, body):
                    return
                start = int((self.headers["Range"] or "bytes=0-")[6:-1]) if server.supports_range else 0
                if start >= len(body):
                    self.send_error(416)
                    return
                head(self, server, body, start)
                self.wfile.write(body[start:])

            def log_message(self, *_arguments: object) -> None:
                pass

        return Handler


def head(handler: BaseHTTPRequestHandler, server: Server, body: bytes, start: int, length: int | None = None) -> None:
    handler.send_response(206 if start else 200)
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
    handler.send_header("Content-Length", str(len(body) - start if length is None else length))
    if tag := server.etag(handler.path):
        handler.send_header("ETag", tag)
    handler.end_headers()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "source").mkdir()
    running = Server(tmp_path / "source")
    yield running
    running.close()


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_download, "FIRST_WAIT_SECONDS", 0.0)


def get(store: Store, server: Server, wanted: tuple[int, ...] = (0, 1, 2)) -> None:
    download.download(store, "web", open_source(server.template, SHARDS), server.template, wanted, parallel=3)


def shards(store: Store) -> dict[str, bytes]:
    return {f"/{key.rsplit('/')[-1]}": store.read(key) for key in store.keys("data/web") if key.endswith(".parquet")}


def wanted_shards(server: Server, numbers: tuple[int, ...] = (0, 1, 2, SHARDS - 1)) -> dict[str, bytes]:
    return {path: server.files[path] for path in (f"/shard_{n:05d}.parquet" for n in numbers)}


FIRST = "/shard_00000.parquet"


def breaks_after(share: float) -> Callable[[BaseHTTPRequestHandler, bytes], bool]:
    """A fault: the connection breaks after this share of the body."""

    def fault(handler: BaseHTTPRequestHandler, body: bytes) -> bool:
        start = int((handler.headers["Range"] or "bytes=0-")[6:-1])
        server = fault.server
        head(handler, server, body, start)
        handler.wfile.write(body[start : start + int((len(body) - start) * share)])
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)
        return True

    return fault


def status(code: int, **headers: str) -> Callable[[BaseHTTPRequestHandler, bytes], bool]:
    def fault(handler: BaseHTTPRequestHandler, _body: bytes) -> bool:
        handler.send_response(code)
        for name, value in {"Content-Length": "0", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        return True

    return fault


def script(server: Server, path: str, *faults: Callable[[BaseHTTPRequestHandler, bytes], bool]) -> None:
    for fault in faults:
        fault.server = server
    server.faults[path] = list(faults)


def test_the_shards_asked_for_and_the_last_one_come_with_a_manifest(store: FolderStore, server: Server) -> None:
    get(store, server)
    assert shards(store) == wanted_shards(server)
    manifest = read_manifest(store, "web")
    assert (manifest.complete, manifest.source) == (True, server.template)
    for name, info in manifest.shards.items():
        assert info.sha256 == hashlib.sha256(server.files[f"/{name}"]).hexdigest()
        assert info.documents == 300
    assert TextDataset(store, "web", "val")[7] == "text 5.7 xxxxxxx"
    assert not (store.root / "data" / "web" / ".incoming").exists()


@pytest.mark.parametrize("url", ["http://[::1/{shard}", "http:///{shard}"])
def test_a_source_that_is_no_address_leaves_nothing(store: FolderStore, url: str) -> None:
    with pytest.raises(UserError, match=r"cannot be downloaded: .*; check --source and --shards"):
        download.download(store, "web", open_source(url, SHARDS), url, (0,), parallel=1)
    assert list(store.root.glob("data/*")) == []


def test_what_is_there_is_not_fetched_again_and_more_can_be_added(store: FolderStore, server: Server) -> None:
    get(store, server, (0, 1))
    get(store, server, (0, 1))
    get(store, server, (1, 3))
    assert all(len(asked) == 1 for asked in server.ranges.values())
    assert shards(store) == wanted_shards(server, (0, 1, 3, 5))
    assert dataset_exists(store, "web")


def test_a_connection_that_breaks_is_taken_up_where_it_broke(store: FolderStore, server: Server) -> None:
    script(server, FIRST, *[breaks_after(0.3)] * 9)  # more interruptions than allowed failures in a row
    get(store, server)
    assert shards(store) == wanted_shards(server)
    starts = [int(asked[6:-1]) for asked in server.ranges[FIRST][1:]]
    assert len(starts) == 9
    assert starts == sorted(set(starts))
    assert starts[0] > 0


def test_an_interrupted_download_goes_on_in_another_process(store: FolderStore, server: Server) -> None:
    script(server, FIRST, breaks_after(0.5), *[status(503)] * http_download.ATTEMPTS)
    with pytest.raises(UserError, match=r"shard_00000\.parquet cannot be downloaded: the server answers 503.*resumes"):
        get(store, server)
    assert FIRST not in shards(store)
    with pytest.raises(UserError, match="is not whole: its download was interrupted"):
        TextDataset(store, "web", "train")
    server.ranges.clear()
    get(store, server)
    assert shards(store) == wanted_shards(server)
    assert server.ranges[FIRST] == [f"bytes={len(server.files[FIRST]) // 2}-"]


@pytest.mark.parametrize("supports_range", [True, False])
def test_a_file_that_changed_in_between_is_fetched_anew(
    store: FolderStore, server: Server, supports_range: bool
) -> None:
    script(server, FIRST, breaks_after(0.5), *[status(503)] * http_download.ATTEMPTS)
    with pytest.raises(UserError):
        get(store, server)
    server.supports_range = supports_range
    server.files[FIRST] = server.files["/shard_00004.parquet"]
    get(store, server)
    assert shards(store) == wanted_shards(server)


def test_a_file_that_became_shorter_in_between_is_fetched_anew(store: FolderStore, server: Server) -> None:
    script(server, FIRST, breaks_after(0.9), *[status(503)] * http_download.ATTEMPTS)
    with pytest.raises(UserError):
        get(store, server)
    path = store.root / "short.parquet"
    pq.write_table(pa.table({"text": ["short"]}), path)
    server.files[FIRST] = path.read_bytes()
    get(store, server)
    assert shards(store) == wanted_shards(server)


def test_without_a_version_of_the_file_a_broken_download_starts_over(store: FolderStore, server: Server) -> None:
    server.etags[FIRST] = ""
    script(server, FIRST, breaks_after(0.5))
    get(store, server)
    assert server.ranges[FIRST] == [None, None]
    assert shards(store) == wanted_shards(server)


@pytest.mark.parametrize("code", [500, 502, 503, 429])
def test_a_server_in_trouble_is_asked_again(store: FolderStore, server: Server, code: int) -> None:
    script(server, FIRST, status(code), status(code, Retry_After="0"))
    get(store, server)
    assert shards(store) == wanted_shards(server)


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_refusal_is_an_error_at_once(store: FolderStore, server: Server, code: int) -> None:
    script(server, FIRST, status(code))
    with pytest.raises(UserError, match=rf"shard_00000\.parquet answers {code} .*; check --source and --shards"):
        get(store, server)
    assert len(server.ranges[FIRST]) == 1
    assert FIRST not in shards(store)


def longer_than_it_is(handler: BaseHTTPRequestHandler, body: bytes) -> bool:
    head(handler, longer_than_it_is.server, body, 0, length=len(body) + 100)
    handler.wfile.write(body)
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    return True


def test_a_body_shorter_than_announced_never_becomes_a_shard(store: FolderStore, server: Server) -> None:
    server.etags[FIRST] = ""
    script(server, FIRST, *[longer_than_it_is] * http_download.ATTEMPTS * 2)
    with pytest.raises(UserError, match=r"without sending complete message body .*received \d+ bytes, expected \d+"):
        get(store, server)
    assert FIRST not in shards(store)


def test_the_sha256_that_a_redirecting_server_names_is_checked(store: FolderStore, server: Server) -> None:
    good, other = "/shard_00001.parquet", "/shard_00004.parquet"
    right = hashlib.sha256(server.files[good]).hexdigest()
    script(server, FIRST, *[status(302, Location=other, X_Linked_Etag=f'"{right}"')] * http_download.ATTEMPTS)
    with pytest.raises(UserError, match="the received file has another sha256 than the server announced"):
        get(store, server)
    script(server, FIRST, status(302, Location=good, X_Linked_Etag=f'"{right}"'))
    get(store, server)
    assert shards(store) == wanted_shards(server) | {FIRST: server.files[good]}


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (not_parquet, "is not a parquet file"),
        (cut_parquet, "is not a parquet file"),
        (no_text_column, "has no 'text' column; it has body, other"),
        (lambda path: pq.write_table(pa.table({"text": pa.array([], pa.string())}), path), "holds no document"),
    ],
)
def test_what_is_no_shard_is_named_by_its_url_and_not_kept(
    store: FolderStore, server: Server, tmp_path: Path, make: Any, complaint: str
) -> None:
    make(tmp_path / "bad")
    server.files[FIRST] = (tmp_path / "bad").read_bytes()
    with pytest.raises(UserError) as raised:
        get(store, server)
    assert str(raised.value).startswith(f"{server.host}{FIRST} {complaint}")
    assert "\n" not in str(raised.value)
    assert FIRST not in shards(store)
    assert not list(store.root.rglob("shard_00000*"))


def test_no_network_is_a_clear_error(store: FolderStore) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        template = f"http://127.0.0.1:{taken.getsockname()[1]}/shard_{{shard}}.parquet"
        with pytest.raises(UserError, match=r"cannot be reached \(.*refused\), 6 times in a row; check the network"):
            download.download(store, "web", open_source(template, 3), template, [0], parallel=2)


def test_a_full_disk_is_a_clear_error_and_what_came_is_kept(store: FolderStore, server: Server) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(UserError, match="cannot be written: File too large; make room and run the same command"):
            get(store, server)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert shards(store) == {}
    get(store, server)
    assert shards(store) == wanted_shards(server)


def test_a_folder_gives_its_parquet_files_in_order_of_their_names(store: FolderStore, tmp_path: Path) -> None:
    folder = tmp_path / "fineweb"
    folder.mkdir()
    for name in ("000_b", "000_a", "001_a", "001_b"):
        write_parquet(folder / f"{name}.parquet", [name])
    download.download(store, "web", open_source(str(folder), 0), str(folder), [0, 1], parallel=2)
    assert list(TextDataset(store, "web", "train")) == ["000_a", "000_b"]
    assert list(TextDataset(store, "web", "val")) == ["001_b"]
    assert len(list(folder.iterdir())) == 4


def test_a_folder_of_the_hub_gives_its_training_files_and_one_for_validation(
    store: FolderStore, tmp_path: Path
) -> None:
    folder = tmp_path / "hub"
    for name in ("data/test-00000-of-00001", "data/train-00000-of-00002", "data/train-00001-of-00002"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_parquet(folder / f"{name}.parquet", [name])
    (folder / "README.md").write_text("# A dataset")
    download.download(store, "web", open_source(str(folder), 0), str(folder), [0, 1], parallel=2)
    assert list(TextDataset(store, "web", "train")) == ["data/train-00000-of-00002", "data/train-00001-of-00002"]
    assert list(TextDataset(store, "web", "val")) == ["data/test-00000-of-00001"]


def test_a_dataset_keeps_to_its_source(store: FolderStore, server: Server, tmp_path: Path) -> None:
    get(store, server)
    with pytest.raises(UserError, match=r"comes from http.*, not from elsewhere; use another --dataset"):
        download.download(store, "web", open_source(server.template, SHARDS), "elsewhere", [0], parallel=1)
    (store.root / "data" / "mine").mkdir()
    write_parquet(store.root / "data" / "mine" / "shard_0.parquet", ["text"])
    with pytest.raises(UserError, match="holds shards that were not downloaded; use another --dataset name"):
        download.download(store, "mine", open_source(server.template, SHARDS), server.template, [0], parallel=1)


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", ["dataset", *argv])
    monkeypatch.setattr("jobs.program.logs.configure", lambda *_: None)
    dataset.main()


def test_the_commands_make_check_and_list_datasets(
    store: FolderStore,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    home = f"--home={store.root}"
    source = f"--source={server.template}"
    run(monkeypatch, "download", "--dataset=web", home, source, f"--source-shards={SHARDS}", "--shards=0-1,3")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"é{i}"}) + "\n" for i in range(40)))
    run(monkeypatch, "convert", f"--data={tmp_path / 'text.jsonl'}", "--dataset=mine", home)
    run(monkeypatch, "validate", "--dataset=mine", home)
    checked = caplog.records[-1]
    assert (checked.message, checked.shards, checked.documents) == ("dataset is valid", 2, 40)
    assert checked.text_bytes == sum(len(f"é{i}".encode()) for i in range(40))
    run(monkeypatch, "list", home)
    _, mine, web = capsys.readouterr().out.splitlines()
    assert mine.split()[:3] == ["mine", "2", "40"]
    assert web.split()[:3] == ["web", "4", "1,200"]


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "give one of the commands download, convert, validate, list"),
        (["fetch"], "give one of the commands"),
        (["download"], "--dataset .* is required"),
        (["download", "--dataset=d", "--shards=3-1"], "--shards is '3-1'; give numbers and ranges such as 0-169"),
        (["download", "--dataset=d", "--shards=all"], "--shards is 'all'"),
        (["download", "--dataset=d", "--shards=6542"], "shard 6542 is not among the training shards 0-6541"),
        (["download", "--dataset=d", "--source=http://host/shard.parquet"], "has no place for the shard's number"),
        (["download", "--dataset=d", "--source=http://host/{x}.parquet"], "has no place for the shard's number"),
        (["download", "--dataset=d", "--source=/nowhere"], "/nowhere is neither a URL with {shard} in it, nor s3"),
        (["download", "--dataset=d", "--source=s3://bucket"], "names a whole bucket; use s3://bucket/prefix"),
        (["download", "--dataset=d", "--parallel=0"], "--parallel is 0; it must be at least 1"),
        (["convert", "--dataset=d", "--data=/nowhere"], "/nowhere does not exist; give a file"),
        (["validate", "--dataset=d"], r"data/d in .* is not valid: data/d in .* holds 0 parquet shard\(s\)"),
    ],
)
def test_a_wrong_command_is_an_error_that_says_what_to_do(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, argv: Any, complaint: str
) -> None:
    monkeypatch.setenv("NANOCHAT_HOME", str(store.root))
    with pytest.raises(UserError, match=complaint):
        run(monkeypatch, *argv)
    assert store.keys("data") == []


def test_convert_replaces_nothing(
    store: FolderStore, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get(store, server)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"data/web in .* is there already; use another"):
        run(monkeypatch, "convert", f"--data={tmp_path / 'a.txt'}", "--dataset=web", f"--home={store.root}")
    assert shards(store) == wanted_shards(server)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_the_commands(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, flag)
    usage, _, *commands = capsys.readouterr().out.splitlines()
    assert usage.startswith("usage: python -m jobs.train.dataset COMMAND [FLAGS]")
    assert [line.split()[0] for line in commands] == list(dataset.COMMANDS)


def test_convert_takes_the_split_and_the_column_that_it_is_told(
    store: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, texts in (("a", ["one", "two"]), ("b", ["three"])):
        write_parquet(tmp_path / f"{name}.parquet", [*texts], column="story")
    flags = [f"--data={tmp_path / 'a.parquet'}", f"--val-data={tmp_path / 'b.parquet'}", "--text-column=story"]
    run(monkeypatch, "convert", "--dataset=mine", *flags, f"--home={store.root}")
    assert list(TextDataset(store, "mine", "train")) == ["one", "two"]
    assert list(TextDataset(store, "mine", "val")) == ["three"]


@pytest.mark.parametrize(("name", "content", "complaint"), BAD, ids=range(len(BAD)))
def test_bad_files_end_convert_with_2_and_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, content: Any,
    complaint: str,
) -> None:  # fmt: skip
    """The bad file comes after a good one, so that the dataset is half written when it is read."""
    good = tmp_path / "text" / "0.txt"
    bad = write(tmp_path / "text" / name, content)
    write(good, b"Some good text.")
    home = tmp_path / "home"
    argv = ["convert", "--dataset=d", f"--data={good}", f"--val-data={bad}", f"--home={home}"]
    monkeypatch.setattr(sys, "argv", ["dataset", *argv])
    monkeypatch.setattr("jobs.program.logs.configure", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        run_main(dataset.main, dataset.PROGRAM)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m jobs.train.dataset: error: {bad}")
    assert complaint in line
    assert [path for path in home.rglob("*") if path.name != "data"] == []


def empty_group(path: Path) -> None:
    schema = pa.schema({"text": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for texts in (["one"], [], ["two"]):
            writer.write_table(pa.table({"text": pa.array(texts, pa.string())}, schema))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (not_parquet, "is not a parquet file"),
        (cut_parquet, "is not a parquet file"),
        (damaged_parquet, "is damaged in row group 0"),
        (no_text_column, "has no 'text' column"),
        (empty_group, "has an empty row group (1)"),
        (lambda path: pq.write_table(pa.table({"text": pa.array([], pa.string())}), path), "holds no document"),
    ],
)
def test_validation_names_every_bad_shard(store: FolderStore, make: Any, complaint: str) -> None:
    folder = store.root / "data" / "hand"
    folder.mkdir(parents=True)
    write_parquet(folder / "shard_0.parquet", ["fine", None, ""])
    write_parquet(folder / "shard_3.parquet", ["fine"])
    assert tuple(validate(store, "hand").values()) == (2, 4, 2, 8)
    for name in ("shard_1.parquet", "shard_2.parquet"):
        make(folder / name)
    with pytest.raises(UserError) as raised:
        validate(store, "hand")
    message = str(raised.value)
    assert f"shard_1.parquet {complaint}" in message
    assert f"shard_2.parquet {complaint}" in message
    assert "\n" not in message


def test_validation_compares_with_the_manifest(store: FolderStore, server: Server) -> None:
    get(store, server)
    folder = store.root / "data" / "web"
    (folder / "shard_00001.parquet").unlink()
    (folder / "shard_00002.parquet").write_bytes(server.files["/shard_00003.parquet"])
    with pytest.raises(
        UserError,
        match=r"shard_00001\.parquet is in dataset\.json, but it is missing; shard_00002\.parquet is not the file that",
    ):
        validate(store, "web")


@pytest.mark.parametrize(("text", "numbers"), [("0", [0]), ("0-3,7", [0, 1, 2, 3, 7]), ("2, 1-2", [1, 2])])
def test_shards_are_chosen_by_numbers_and_ranges(text: str, numbers: list[int]) -> None:
    assert shard_numbers(text) == numbers
