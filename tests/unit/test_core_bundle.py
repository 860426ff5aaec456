"""Evaluation bundles: reading their files, errors about broken files, and unpacking a zip."""

import hashlib
import io
import json
import os
import random
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs.data import http_download
from jobs.measures.core.bundle import CORE_TASKS, Bundle, Task, open_bundle, read_bundle
from jobs.measures.core.download import locate_bundle
from jobs.measures.core.run import centered
from nanochat_core.errors import UserError
from nanochat_core.store import FolderStore
from nanochat_core.training.distributed import ALONE
from tests.support.core_bundles import TaskFile, random_tasks, write_bundle

CHOICE = {"query": "Q", "choices": ["yes", "no"], "gold": 1}


def read(folder: Path, most: int = 0) -> Bundle:
    return read_bundle(open_bundle(str(folder)), most)


def one_task(folder: Path, task: TaskFile) -> Task:
    (read_task,) = read(write_bundle(folder, [task])).tasks
    return read_task


def test_tasks_are_read_as_the_files_describe_them(tmp_path: Path) -> None:
    tasks = random_tasks(6, items=9)
    bundle = read(write_bundle(tmp_path, tasks))
    assert [(t.label, t.kind, t.shots, len(t.items)) for t in bundle.tasks] == [
        (t.label, t.kind, t.shots, 9) for t in tasks
    ]
    assert {task.baseline for task in bundle.tasks} == {0.25}


def test_accuracies_are_centered_so_that_guessing_is_nothing_and_perfection_one(tmp_path: Path) -> None:
    task = one_task(tmp_path, TaskFile("t", "multiple_choice", [CHOICE, CHOICE], baseline=50.0))
    assert [centered(accuracy, task.baseline) for accuracy in (0.5, 0.75, 1.0, 0.0)] == [0.0, 0.5, 1.0, -1.0]


def test_items_are_shuffled_alike_every_time_before_they_are_capped(tmp_path: Path) -> None:
    items = [{"context": f"c{i}", "continuation": "x"} for i in range(50)]
    folder = write_bundle(tmp_path, [TaskFile("t", "language_modeling", items)])
    expected = [f"c{i} x" for i in range(50)]
    random.Random(1337).shuffle(expected)
    assert [item.shown for item in read(folder).tasks[0].items] == expected
    assert [item.shown for item in read(folder, 7).tasks[0].items] == expected[:7]


def test_blank_lines_between_items_and_line_separators_inside_them_are_no_items(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path, [TaskFile("t", "multiple_choice", [CHOICE])])
    file = folder / "eval_data/some/t.jsonl"
    item = {"query": "a\u2028b", "choices": ["c\u0085d", "e"], "gold": 0}
    file.write_bytes(json.dumps(item, ensure_ascii=False).encode() + b"\r\n\n" + file.read_bytes())
    (task,) = read(folder).tasks
    assert {found.asked[0] for found in task.items} == {"a\u2028b c\u0085d", "Q yes"}


def test_tasks_without_a_file_and_tasks_that_are_not_named_are_missing(tmp_path: Path) -> None:
    tasks = [TaskFile(label, "multiple_choice", [CHOICE]) for label in ("copa", "piqa", "boolq")]
    folder = write_bundle(tmp_path, tasks)
    (folder / "eval_data/some/piqa.jsonl").unlink()
    bundle = read(folder)
    assert [task.label for task in bundle.tasks] == ["copa", "boolq"]
    assert sorted(bundle.missing) == sorted(set(CORE_TASKS) - {"copa", "boolq"})
    assert len(CORE_TASKS) == len(set(CORE_TASKS)) == 22


def test_a_bundle_of_all_tasks_is_not_partial(tmp_path: Path) -> None:
    tasks = [TaskFile(label, "multiple_choice", [CHOICE]) for label in CORE_TASKS]
    assert read(write_bundle(tmp_path, tasks)).missing == ()


def test_public_tasks_are_read_whole() -> None:
    if "NANOCHAT_TEST_DATA" not in os.environ:
        pytest.skip("NANOCHAT_TEST_DATA is not set")
    bundle = read(Path(os.environ["NANOCHAT_TEST_DATA"], "core_bundle"))
    found = {task.label: (task.kind, task.shots, len(task.items), task.baseline) for task in bundle.tasks}
    assert len(found) + len(bundle.missing) == 22
    assert found["arc_easy"] == ("multiple_choice", 10, 2376, 0.25)
    assert found["winograd"] == ("schema", 0, 273, 0.5)
    assert found["lambada_openai"] == ("language_modeling", 0, 5153, 0.0)
    (boolq,) = (task for task in bundle.tasks if task.label == "boolq")
    assert all(item.shown.endswith(("\nAnswer: yes", "\nAnswer: no")) for item in boolq.items)


def test_the_digest_tells_what_is_used(tmp_path: Path) -> None:
    tasks = random_tasks(3, items=5)
    folder = write_bundle(tmp_path / "a", tasks)
    digest = read(folder).digest
    assert read(write_bundle(tmp_path / "b", tasks)).digest == digest
    (folder / "eval_data/some/unused.jsonl").write_text("unused")
    assert read(folder).digest == digest
    changes: list[Callable[[], object]] = [
        lambda: (folder / "eval_data/some/task_0.jsonl").open("a").write("\n"),
        lambda: (folder / "core.yaml").write_text((folder / "core.yaml").read_text().replace("- 0", "- 1")),
        lambda: (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\ntask_0,1\ntask_1,1\ntask_2,1\n"),
        lambda: (folder / "eval_data/some/task_1.jsonl").unlink(),
    ]
    seen = {digest}
    for change in changes:
        change()
        seen.add(read(folder).digest)
    assert len(seen) == 1 + len(changes)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("core.yaml", None, "is no evaluation bundle: it has no core.yaml"),
        ("eval_meta_data.csv", None, "is no evaluation bundle: it has no eval_meta_data.csv"),
        ("core.yaml", "icl_tasks: [", "core.yaml in .* is no list of icl_tasks"),
        ("core.yaml", "tasks: []", "core.yaml in .* is no list of icl_tasks"),
        ("core.yaml", "icl_tasks: 3", "core.yaml in .* is no list of icl_tasks"),
        ("core.yaml", "icl_tasks: [t]", "'t' under icl_tasks is no task"),
        ("core.yaml", "icl_tasks: []", "has no file of any of the tasks"),
        ("core.yaml", "icl_tasks: [{label: ../up}]", "'../up' is no task's label"),
        ("core.yaml", "icl_tasks: [{label: t, icl_task_type: essay}]", "icl_task_type of t is 'essay'; .* schema"),
        (
            "core.yaml",
            "icl_tasks: [{label: t, icl_task_type: schema, num_fewshot: 3}]",
            "num_fewshot of t is 3; it must be a list",
        ),
        (
            "core.yaml",
            "icl_tasks: [{label: t, icl_task_type: schema, num_fewshot: [0]}]",
            "dataset_uri of t is None; it must be a file below eval_data",
        ),
        (
            "core.yaml",
            "icl_tasks: [{label: t, icl_task_type: schema, num_fewshot: [0], dataset_uri: ../../core.yaml}]",
            r"\.\./",
        ),
        ("eval_meta_data.csv", "Eval Task,Guess\nt,25\n", "no table of random baselines: there is no column 'Random"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\nt,half\n", "no table of random baselines: could not"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\nt,100\n", "100.0 % cannot be a baseline"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\nu,25\n", "has no random baseline of the task t"),
        ("eval_data/some/t.jsonl", "{", "t.jsonl in .*, line 1: no item of a multiple_choice task"),
        ("eval_data/some/t.jsonl", "[]", "line 1: .*it is no JSON object"),
        ("eval_data/some/t.jsonl", '{"query": "q", "gold": 0}', "line 1: .*'choices' is missing"),
        ("eval_data/some/t.jsonl", '{"query": 3, "choices": ["a", "b"], "gold": 0}', "query is 3, which is no text"),
        ("eval_data/some/t.jsonl", '{"query": "q", "choices": [], "gold": 0}', "choices must be a list of texts"),
        ("eval_data/some/t.jsonl", '{"query": "q", "choices": ["a", "b"], "gold": 2}', "gold is 2, which is none of"),
        ("eval_data/some/t.jsonl", '{"query": "q", "choices": ["a", "b"], "gold": 0}', "shows 1 examples before each"),
    ],
)
def test_what_is_no_bundle_is_refused_with_the_place_that_is_wrong(
    tmp_path: Path, file: str, content: str | None, problem: str
) -> None:
    folder = write_bundle(tmp_path, [TaskFile("t", "multiple_choice", [CHOICE, CHOICE], shots=1)])
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(UserError, match=problem):
        read(folder)


def test_a_task_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path, [TaskFile("t", "multiple_choice", [CHOICE])] * 2)
    with pytest.raises(UserError, match="has the task t twice"):
        read(folder)


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the evaluation bundle .*/nowhere is no folder; give a folder, s3://"):
        open_bundle(str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


class Web:
    """Serves one zip, and counts the requests."""

    def __init__(self) -> None:
        self.body = b""
        self.requests = 0
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.requests += 1
                if self.path != "/bundle.zip":
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(web.body)))
                self.end_headers()
                self.wfile.write(web.body)

            def log_message(self, *_arguments: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/bundle.zip"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(http_download, "FIRST_WAIT_SECONDS", 0.0)
    running = Web()
    yield running
    running.close()


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def members_of(folder: Path, top: str = "eval_bundle/") -> dict[str, bytes]:
    return {
        top + path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("top", ["eval_bundle/", "", "some/where/"])
def test_a_zip_on_the_web_is_fetched_once_and_is_the_bundle_that_was_packed(
    tmp_path: Path, store: FolderStore, web: Web, top: str
) -> None:
    folder = write_bundle(tmp_path / "bundle", random_tasks(3, items=5))
    web.body = zipped(members_of(folder, top) | {"__MACOSX/core.yaml/x": b"", f"{top}eval_data/.DS_Store": b""})
    files = locate_bundle(web.url, store, ALONE)
    assert read_bundle(files) == read(folder)
    assert locate_bundle(web.url, store, ALONE) == files
    assert web.requests == 1
    source = json.loads(files.read("source.json"))
    assert source == {"source": web.url, "sha256": hashlib.sha256(web.body).hexdigest()}
    assert not list((tmp_path / "store").rglob("*.zip"))


@pytest.mark.parametrize("name", ["../evil", "eval_bundle/../../evil", "/evil", "eval_bundle/eval_data/..\\evil"])
def test_a_zip_whose_members_leave_it_is_refused_and_nothing_is_written(
    tmp_path: Path, store: FolderStore, web: Web, name: str
) -> None:
    folder = write_bundle(tmp_path / "bundle", random_tasks(1, items=5))
    web.body = zipped(members_of(folder) | {name: b"evil"})
    with pytest.raises(UserError, match="a path out of its folder; it is not unpacked"):
        locate_bundle(web.url, store, ALONE)
    assert not list(tmp_path.rglob("*evil*"))
    assert store.keys("bundles") == []


def test_a_zip_with_a_link_is_refused(tmp_path: Path, store: FolderStore, web: Web) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("core.yaml", "icl_tasks: []")
        link = zipfile.ZipInfo("eval_data")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc")
    web.body = buffer.getvalue()
    with pytest.raises(UserError, match="holds the link 'eval_data'"):
        locate_bundle(web.url, store, ALONE)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"no zip", "is no zip that can be read"),
        (zipped({"readme": b""}), r"holds no core\.yaml"),
        (zipped({"core.yaml": b"x" * 100_000})[:-200], "is no zip that can be read"),
    ],
    ids=["no zip", "another zip", "half a zip"],
)
def test_what_is_no_bundle_is_refused_and_not_kept(store: FolderStore, web: Web, body: Any, problem: str) -> None:
    web.body = body
    for attempt in (1, 2):
        with pytest.raises(UserError, match=problem):
            locate_bundle(web.url, store, ALONE)
        assert web.requests == attempt
    assert store.keys("bundles") == []


def test_a_zip_that_would_fill_the_disk_is_refused(
    store: FolderStore, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.measures.core.download.MOST_BYTES", 1000)
    web.body = zipped({"core.yaml": b"x" * 1001})
    with pytest.raises(UserError, match="unpacks to more than"):
        locate_bundle(web.url, store, ALONE)


def test_a_server_without_the_bundle_is_named(store: FolderStore, web: Web) -> None:
    with pytest.raises(UserError, match="answers 404 Not Found; give --bundle another URL"):
        locate_bundle(web.url + "x", store, ALONE)
