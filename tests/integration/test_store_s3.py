"""The artifact store on S3, against a real server: the contract of every store, transfers, and clear errors."""

import copy
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import pytest
import torch

from nanochat_core.checkpoint import (
    CheckpointRef,
    list_checkpoints,
    load_checkpoint,
    load_trainer_state,
    newest_checkpoint,
    promote,
    promoted,
)
from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.store import Lease, NameInUse, S3Store, Store, StoreError, lease, open_store
from nanochat_core.store.cache import DownloadCache
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.checkpoint_writer import save_checkpoint
from nanochat_core.training.optim import Shard
from tests.support.checkpoint_replacement import CheckpointReplacement
from tests.support.store_contract import LAST, StoreContract, contents, publish

BUCKET = "nanochat-tests"
ACCESS_KEY, SECRET_KEY = "test", "testtest"


def find_server() -> str:
    caches = [Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanochat-tests" / "bin"]
    caches.append(Path.home() / ".cache" / "kube-node" / "bin")
    found = shutil.which("versitygw", path=os.pathsep.join([os.environ["PATH"], *map(str, caches)]))
    if found is None:
        pytest.skip("versitygw, the S3 server of these tests, is not installed; tests/install-servers builds it")
    return found


def start_server(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server whose buckets are the folders in ``folder``, wait until it answers, and return it and its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    log = folder.with_suffix(".log")
    folder.mkdir(exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [find_server(), "--quiet", "--port", address, "posix", folder],
            env={"ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://{address}/", timeout=5)
        except urllib.error.HTTPError:
            return process, f"http://{address}"  # any answer shows that the server runs
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.skip(f"versitygw does not start here: {log.read_text()[-500:]}")
            time.sleep(0.05)


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process, url = start_server(tmp_path_factory.mktemp("s3") / "buckets")
    session = boto3.session.Session(ACCESS_KEY, SECRET_KEY, region_name="us-east-1")
    session.client("s3", endpoint_url=url).create_bucket(Bucket=BUCKET)
    yield url
    process.terminate()
    process.wait(60)


@pytest.fixture(scope="module", autouse=True)
def connected(server_url: str) -> Iterator[S3Store]:
    """A store on the server that the AWS_* variables describe while these tests run."""
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            environment.delenv(name)
        environment.setenv("AWS_ENDPOINT_URL", server_url)
        environment.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        environment.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        environment.setenv("AWS_REGION", "us-east-1")
        environment.setenv("AWS_CONFIG_FILE", os.devnull)
        environment.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        opened = open_store(f"s3://{BUCKET}")
        assert isinstance(opened, S3Store)
        yield opened


@pytest.fixture
def url() -> str:
    """A prefix of the bucket that nothing else uses."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/deep"


@pytest.fixture
def store(connected: S3Store, url: str, tmp_path: Path) -> Store:
    """The store at ``url`` with its own cache. All stores share one client, because creating one takes 0.25 seconds."""
    store = copy.copy(connected)
    store.prefix, store.cache = url.removeprefix(f"s3://{BUCKET}/"), DownloadCache(tmp_path / "cache")
    return store


class TestS3Store(StoreContract):
    pass


def test_a_store_at_the_top_of_a_bucket_works_too(tmp_path: Path) -> None:
    store = open_store(f"s3://{BUCKET}", cache_dir=tmp_path)
    publish(store, "top/p", {"a": b"1"})
    assert contents(store, "top/p") == {"a": b"1", LAST: b"whole"}
    assert store.fetch("top/p/a").read_bytes() == b"1"
    store.delete("top")
    assert store.keys("top") == []


def test_a_file_of_many_parts_arrives_whole(store: Store) -> None:
    data = os.urandom(1 << 20) * 24  # boto3 sends parts of 8 MiB
    publish(store, "p", {"large": data})
    fetched = store.fetch("p/large")
    assert fetched.read_bytes() == data
    assert "-" in fetched.relative_to(store.cache.folder).parts[0], "its tag says that it came in one part"


def test_a_fetched_file_is_downloaded_once_and_again_when_it_changed(store: Store) -> None:
    store.write("a", b"first")
    path = store.fetch("a")
    inode = path.stat().st_ino
    assert store.fetch("a").stat().st_ino == inode
    store.write("a", b"other")
    assert store.fetch("a").read_bytes() == b"other"


def test_more_keys_than_one_page_are_all_listed(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(5):
        store.write(f"m/{i}", b"")
    paginator = store.client.get_paginator

    class PagesOfTwo:
        def __init__(self, name: str) -> None:
            self.pages = paginator(name)

        def paginate(self, **request: object) -> object:
            return self.pages.paginate(**request, PaginationConfig={"PageSize": 2})

    monkeypatch.setattr(store.client, "get_paginator", PagesOfTwo)
    assert store.keys("m") == [f"m/{i}" for i in range(5)]


def test_the_last_file_is_missing_while_a_folder_is_replaced(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store, "p", {"a": b"old", "b": b"old"})
    upload, seen = store.client.upload_file, []

    def watched(path: str, bucket: str, key: str) -> None:
        upload(path, bucket, key)
        seen.append((key.rpartition("/")[2], store.exists(f"p/{LAST}")))

    monkeypatch.setattr(store.client, "upload_file", watched)
    publish(store, "p", {"a": b"new", "z": b"new"})
    assert seen == [("a", False), ("z", False), (LAST, True)]


CALLS: dict[str, Callable[[Any], Any]] = {
    "read": lambda store: store.read("a"),
    "exists": lambda store: store.exists("a"),
    "write": lambda store: store.write("a", b"x"),
    "keys": lambda store: store.keys("folder"),
    "fetch": lambda store: store.fetch("a"),
    "delete": lambda store: store.delete("folder"),
    "publish": lambda store: publish(store, "folder", {"a": b""}),
}


@pytest.mark.parametrize("call", CALLS)
def test_wrong_credentials_are_a_clear_error(
    store: Store, url: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("a", b"kept")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(StoreError, match=rf"{url} refused .*(signature|Forbidden)") as refused:
        CALLS[call](open_store(url))
    assert "wrong-secret" not in str(refused.value)
    assert store.read("a") == b"kept"


@pytest.mark.parametrize("call", ["read", "fetch", "publish"])
def test_a_server_that_is_down_is_a_clear_error_soon(url: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(StoreError, match=f"{url} cannot be reached: Could not connect"):
            CALLS[call](open_store(url))
    assert time.monotonic() - started < 20


def test_no_credentials_are_a_clear_error(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match="credentials"):
        open_store(url).read("a")


def test_a_bucket_that_is_not_there_is_a_clear_error() -> None:
    store = open_store("s3://no-such-bucket/x")
    for call in ("read", "write", "keys", "publish"):
        with pytest.raises(StoreError, match="NoSuchBucket"):
            CALLS[call](store)


def test_an_endpoint_that_is_no_url_is_a_clear_error(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(UserError, match=r"AWS_.*nonsense"):
        open_store(url)


def test_a_cache_that_cannot_be_written_is_a_clear_error(store: Store, url: str, tmp_path: Path) -> None:
    store.write("a", b"x")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=f"the cache {tmp_path}/file/{BUCKET} cannot be written: Not a directory"):
        open_store(url, cache_dir=tmp_path / "file").fetch("a")


@pytest.mark.parametrize("lost", ["server", "bucket"])
def test_an_upload_that_fails_in_the_middle_is_a_clear_error(
    tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, address = start_server(tmp_path / "buckets")
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)

    def lose() -> None:
        if lost == "bucket":
            shutil.rmtree(tmp_path / "buckets" / BUCKET)
        else:
            process.kill()
            process.wait()

    try:
        boto3.session.Session().client("s3").create_bucket(Bucket=BUCKET)
        store = open_store(f"s3://{BUCKET}/x")
        upload = store.client.upload_file

        def losing(path: str, bucket: str, key: str) -> None:
            if key.endswith("b"):
                lose()
            upload(path, bucket, key)

        monkeypatch.setattr(store.client, "upload_file", losing)
        with pytest.raises(StoreError, match=f"{store} .*p/b"):
            publish(store, "p", {"a": b"1", "b": b"2"})
    finally:
        process.kill()
        process.wait()


HOLD = """
import sys, time
from nanochat_core.store import Lease, open_store
with Lease(open_store(sys.argv[1]), "models/demo", "held", seconds=6):
    print("held", flush=True)
    time.sleep(60)
"""


def test_of_two_processes_one_has_the_name_and_the_other_takes_over_after_kill_9(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process is on another machine, so it must watch the lease of the first."""
    monkeypatch.setattr(lease, "_machine", lambda: "another machine")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(store)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(NameInUse, match=rf"^held \(process {holder.pid} on .*\) is writing models/demo in {store}"):
        Lease(store, "models/demo", "second", seconds=6).__enter__()
    holder.kill()
    holder.wait()
    started = time.monotonic()
    with Lease(store, "models/demo", "second", seconds=6) as second:
        assert time.monotonic() - started >= 6
        second.renew()
    assert store.keys("leases") == []


def test_a_server_without_conditional_writes_is_warned_of(
    store: S3Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put = store.client.put_object

    def refusing(**arguments: Any) -> Any:
        if arguments.keys() & {"IfMatch", "IfNoneMatch"}:
            refusal = {"Error": {"Code": "NotImplemented", "Message": "A header you provided is not implemented"}}
            raise botocore.exceptions.ClientError(refusal, "PutObject")
        return put(**arguments)

    monkeypatch.setattr(store.client, "put_object", refusing)
    with Lease(store, "models/demo", "first") as first:
        first.renew()
        assert "the store's server has no conditional writes" in caplog.text
        with pytest.raises(NameInUse, match="first"), Lease(store, "models/demo", "second"):
            pytest.fail("two programs got one name")


TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
CONFIG = ModelConfig.from_depth(1, vocab_size=TOKENIZER.vocab_size, head_dim=32, context_length=16)


def tiny_model(seed: int) -> GPT:
    model = GPT(CONFIG)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def test_checkpoints_are_saved_loaded_and_promoted(store: Store) -> None:
    model, momentum = tiny_model(1), torch.arange(5.0)
    first, second = CheckpointRef("m", "base", 3), CheckpointRef("m", "base", 20)
    save_checkpoint(
        store,
        first,
        model=model,
        tokenizer=TOKENIZER,
        meta={"loss": 1.5},
        values={"step": 3},
        shards=[Shard("momentum", momentum, 0, 5)],
    )
    save_checkpoint(store, second, model=tiny_model(2), tokenizer=TOKENIZER, meta={})
    assert list_checkpoints(store, "m", "base") == [first, second]
    loaded = load_checkpoint(store, first)
    assert loaded.meta == {"loss": 1.5, "tokenizer_digest": TOKENIZER.digest}
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in model.state_dict().items())
    resumed = load_trainer_state(store, first)
    assert resumed.values == {"step": 3}
    read = resumed.read("momentum", 1, 4)
    assert read is not None
    assert torch.equal(read, momentum[1:4])
    assert promoted(store, "m") is None
    promote(store, first)
    assert promoted(store, "m") == first


def test_a_damaged_checkpoint_is_named_and_passed_over(store: Store) -> None:
    whole, damaged = CheckpointRef("m", "sft", 1), CheckpointRef("m", "sft", 2)
    for ref in (whole, damaged):
        save_checkpoint(store, ref, model=tiny_model(ref.step), tokenizer=TOKENIZER, meta={})
    weights = bytearray(store.read(f"{damaged.prefix}/model.safetensors"))
    weights[-1] ^= 1
    store.write(f"{damaged.prefix}/model.safetensors", bytes(weights))
    with pytest.raises(UserError, match=r"models/m/sft/step_000002/model\.safetensors does not match its sha256"):
        load_checkpoint(store, damaged)
    newest = newest_checkpoint(store, "m", "sft")
    assert newest is not None
    assert newest.ref == whole


class TestReplacement(CheckpointReplacement):
    pass


def test_a_bounded_cache_keeps_the_checkpoint_that_was_loaded_last(store: S3Store, tmp_path: Path) -> None:
    refs = [CheckpointRef("m", "base", step) for step in (1, 2, 3)]
    for ref in refs:
        save_checkpoint(store, ref, model=tiny_model(ref.step), tokenizer=TOKENIZER, meta={})
    size = sum(len(store.read(key)) for key in store.keys(refs[0].prefix))
    store.cache = DownloadCache(tmp_path / "bounded", limit_bytes=int(1.5 * size))
    for ref in refs:
        loaded = load_checkpoint(store, ref)
        assert torch.equal(loaded.weights["head.weight"], tiny_model(ref.step).head.weight)
        files = [path for path in store.cache.folder.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= 1.5 * size
        assert sum(f"/{ref.prefix}/" in str(path) for path in files) == 4
