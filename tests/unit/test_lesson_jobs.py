"""The program that watches gives lessons as PyTorchJobs, whatever happens to it, to the pods and to the API server."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.teach.lesson_jobs import job_name, read_template
from nanochat_core.errors import RetryableError, UserError
from nanochat_core.lessons.records import Lesson, write_lesson
from nanochat_core.store import FolderStore, Lease
from tests.support.fake_cluster import CALL_FAULTS
from tests.support.lesson_cluster import RULES, TEMPLATE, World

NAME = "nanochat-lesson-demo-1"
# Until the third moment, a pod starts. What the script has then decides how the pod ends.
STARTS = ["", ""]
# What may happen to a call, besides SIGTERM, which ends the program in the usual way.
BROKEN_CALLS = [fault for fault in CALL_FAULTS if fault != "stopped"]


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


def names(world: World) -> list[str]:
    return [job["metadata"]["name"] for job in world.cluster.pytorch_jobs()]


def test_a_lesson_is_one_pytorch_job_made_from_the_template(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(store, monkeypatch)
    world.add()
    world.run(2)
    (job,) = world.cluster.pytorch_jobs()
    replica = job["spec"]["pytorchReplicaSpecs"]["Master"]
    assert job["metadata"]["name"] == NAME
    assert job["metadata"]["labels"] == {"app": "nanochat", "nanochat/lessons": "nanochat-lesson"}
    assert job["spec"]["runPolicy"]["ttlSecondsAfterFinished"] == 3600
    assert (list(job["spec"]["pytorchReplicaSpecs"]), replica["replicas"]) == (["Master"], 1)
    (container,) = replica["template"]["spec"]["containers"]
    assert container["image"] == "nanochat-jobs:dev"
    assert container["args"] == [
        *("python", "-m", "jobs.teach", "demo", "--home", str(store), "--device", "auto", "--threads", "0"),
        *("--until", "1"),
    ]
    world.run(60)
    assert world.read().state == "promoted"
    assert world.cluster.created == [NAME]


def test_a_controller_that_starts_again_in_the_middle_takes_the_job_over(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(store, monkeypatch)
    world.add()
    for _ in range(4):
        world.start()
        world.run(1)
    world.start()
    world.run(20)
    assert world.read().state == "promoted"
    assert world.cluster.created == [NAME]


@pytest.mark.parametrize("fault", BROKEN_CALLS)
@pytest.mark.parametrize("call", range(9))
def test_a_call_that_fails_makes_no_second_job(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, fault: str, call: int
) -> None:
    world = World(store, monkeypatch, calls=[*[""] * call, fault])
    world.add()
    for _ in range(20):
        try:
            world.run(1)
        except RetryableError:  # the program logs it, and looks again
            world.cluster.sleep(1.0)
    assert world.cluster.faults == [fault]
    assert world.read().state == "promoted"
    assert world.cluster.created == [NAME]


def test_while_the_api_server_is_away_the_program_goes_on_and_counts_nothing(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(store, monkeypatch, calls=[*[""] * 3, *["unavailable"] * 500])
    lesson = world.add()
    world.run(1)
    away = world.cluster.now
    for _ in range(500):
        with pytest.raises(RetryableError, match="the API server does not"):
            world.look()
    assert world.cluster.now == away, "a look does not wait for the server"
    assert world.read() == lesson
    world.run(20)
    assert world.read().state == "promoted"
    assert world.cluster.created == [NAME]


def test_a_job_that_somebody_deletes_is_created_again_after_its_pod_has_ended(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(store, monkeypatch)
    lesson = world.add()
    world.run(2)
    world.cluster.delete_pytorch_job(NAME)
    world.look()
    assert names(world) == [], "the old pod is still there"
    world.run(2)
    assert names(world) == [NAME]
    assert world.read() == lesson
    world.run(20)
    assert world.read().state == "promoted"
    assert world.cluster.created == [NAME] * 2


@pytest.mark.parametrize("code", [0, 3, 4, 5])
def test_a_program_that_ended_its_lesson_is_followed_by_the_next_lesson(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    world = World(store, monkeypatch, [*STARTS, f"exit {code}" if code else ""])
    world.add()
    world.add()
    world.run(8)
    assert world.read().state == {0: "promoted", 3: "refused", 4: "failed", 5: "canceled"}[code]
    world.run(20)
    assert world.read(2).state == "promoted"
    assert world.cluster.created == [NAME, "nanochat-lesson-demo-2"]


@pytest.mark.parametrize("fault", ["exit 138", "exit 143", "exit 130", "evicted", "preempted"])
def test_what_is_no_fault_of_the_lesson_counts_no_attempt(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    world = World(store, monkeypatch, [fault] * 400)
    lesson = world.add()
    world.run(400)
    assert world.read() == lesson
    assert 5 < len(world.cluster.created) < 12, "the pauses grow"
    assert set(world.cluster.created) == {NAME}
    world.cluster.end_faults()
    world.run(320)
    assert world.read().state == "promoted"


@pytest.mark.parametrize(
    ("fault", "code"), [("exit 1", 1), ("exit 137", 137), ("exit 139", 139), ("out of memory", 137)]
)
def test_a_lesson_whose_program_always_dies_fails_after_five_attempts(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, fault: str, code: int
) -> None:
    world = World(store, monkeypatch, [fault] * 1000)
    world.add()
    world.run(400)
    lesson = world.read()
    assert (lesson.state, lesson.attempts) == ("failed", 5)
    assert lesson.reason == f"its program died 5 times with exit code {code}; the log of the program says why"
    assert world.cluster.created == [NAME] * 5
    assert names(world) == [NAME], "its log can still be read"


def test_a_lesson_that_its_program_refuses_is_not_tried_again(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(store, monkeypatch, [*STARTS, "exit 2"])
    world.add()
    world.run(100)
    assert world.read().state == "failed"
    assert "its program refused to begin with exit code 2" in world.read().reason
    assert world.cluster.created == [NAME]


def test_an_attempt_is_counted_once_even_if_the_controller_starts_again(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(store, monkeypatch, [*STARTS, "exit 1"])
    world.add()
    world.run(4)
    for _ in range(3):
        world.start()
        world.run(2)
    assert (world.read().state, world.read().attempts) == ("queued", 1)
    assert world.cluster.created == [NAME]


def test_a_controller_that_starts_again_does_not_pause_because_of_a_lesson_that_has_failed(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(store, monkeypatch, [*STARTS, "exit 2"])
    world.add()
    world.run(20)
    assert world.read().state == "failed"
    world.start()
    world.add()
    world.run(2)
    assert world.cluster.created == [NAME, "nanochat-lesson-demo-2"]


def test_an_attempt_begins_when_the_ended_pod_of_the_one_before_is_gone_too(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(store, monkeypatch, [*STARTS, "exit 138"])
    world.add()
    world.run(4)
    (pod,) = world.cluster.pods()
    assert pod["status"]["phase"] == "Failed"
    world.cluster.delete_pytorch_job(NAME)
    world.cluster.sleep(10.0)
    world.cluster.leave_pod(pod)
    world.look()
    world.look()
    assert names(world) == [], "the new pod could not have the name"
    world.cluster.collect_pod(pod["metadata"]["name"])
    world.look()
    assert names(world) == [NAME]


def test_an_attempt_that_the_program_itself_counted_is_not_counted_again(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(store, monkeypatch, [*STARTS, "", "exit 1"])
    lesson = world.add()
    world.writes = False
    world.run(1)
    begun = dataclasses.replace(lesson, state="training", attempts=1, parent={"revision": "sft/step_000001"})
    write_lesson(store, begun)
    world.run(4)
    assert world.read() == begun


def test_nothing_is_counted_while_another_program_gives_the_lesson(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(store, monkeypatch, [*STARTS, "exit 1"])
    lesson = world.add()
    with Lease(store, "models/demo", "jobs.teach"):
        world.run(5)
    assert world.read() == lesson


def test_a_lesson_in_a_queue_of_kueue_waits_and_counts_nothing(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="jobs.teach")
    world = World(store, monkeypatch)
    world.template["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "training"
    world.cluster.queue_stages("training", moments=30)
    lesson = world.add()
    world.run(25)
    assert world.read() == lesson
    reasons = [vars(record)["reason"] for record in caplog.records if record.message == "lesson suspended"]
    assert reasons == ["it waits in the queue training of Kueue; kubectl describe workloads says why"]
    world.run(20)
    assert world.read().state == "promoted"
    assert world.cluster.created == [NAME]


def test_a_lesson_that_kueue_stops_goes_on_in_the_same_job(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(store, monkeypatch)
    lesson = world.add()
    world.run(2)
    world.cluster.suspend_pytorch_job(NAME, True)
    world.run(20)
    assert world.cluster.pods() == []
    assert world.read() == lesson
    world.cluster.suspend_pytorch_job(NAME, False)
    world.run(10)
    assert world.read().state == "promoted"
    assert world.cluster.created == [NAME]


@pytest.mark.parametrize("moment", ["before its job", "in its pod", "in the queue of Kueue", "in a pause"])
def test_a_canceled_lesson_ends_within_seconds_and_leaves_nothing_in_the_cluster(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    world = World(store, monkeypatch, ["", *["exit 1"] * 100] if moment == "in a pause" else [])
    if moment == "in the queue of Kueue":
        world.template["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "training"
        world.cluster.queue_stages("training", moments=1000)
    world.add()
    world.add()
    world.run({"before its job": 0, "in its pod": 2, "in the queue of Kueue": 10, "in a pause": 30}[moment])
    world.cancel()
    world.cancel(2)
    world.run(4)
    assert world.read().state == "canceled"
    assert world.read().finished
    assert NAME not in names(world)
    assert [pod for pod in world.cluster.pods() if pod["metadata"]["name"].startswith(NAME)] == []
    assert world.cluster.created.count(NAME) == {"before its job": 0, "in a pause": 3}.get(moment, 1)
    world.run(2)
    assert world.read(2).state == "canceled"
    assert set(world.cluster.created) <= {NAME}


def test_a_lesson_that_its_own_program_ends_as_canceled_leaves_nothing_in_the_cluster(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(store, monkeypatch, [*STARTS, "exit 5"])
    world.add()
    world.run(6)
    assert world.read().state == "canceled"
    assert (names(world), world.cluster.pods()) == ([], [])


def test_a_job_that_ends_after_its_lesson_was_canceled_by_its_own_program_is_deleted_too(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(store, monkeypatch, [*STARTS, "exit 5"])
    lesson = world.add()
    world.run(2)
    write_lesson(store, dataclasses.replace(lesson, state="canceled"))  # and the pod still runs
    world.run(5)
    assert (names(world), world.cluster.pods()) == ([], [])


def test_a_canceled_lesson_is_ended_by_one_process(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    started = list[int]()

    def end_canceled(_world: World, lesson: Lesson) -> Any:
        started.append(lesson.number)
        return SimpleNamespace(poll=lambda: None)

    monkeypatch.setattr(World, "end_canceled", end_canceled)
    world = World(store, monkeypatch)
    world.add()
    world.cancel()
    world.run(5)
    assert started == [1]


def test_a_canceled_lesson_whose_job_ends_meanwhile_keeps_its_result(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(store, monkeypatch)
    world.add()
    world.run(2)
    world.cancel()
    world.cluster.sleep(1.0)
    assert world.read().state == "promoted"
    world.run(10)
    assert world.read().state == "promoted"


def test_lessons_of_two_models_run_side_by_side_and_those_of_one_model_do_not(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(store, monkeypatch)
    for model in ("demo", "demo", "other"):
        world.add(model)
    world.run(2)
    assert names(world) == [NAME, "nanochat-lesson-other-1"]
    world.run(20)
    states = [world.read(1).state, world.read(2).state, world.read(1, "other").state]
    assert states == ["promoted"] * 3
    assert world.cluster.created == [NAME, "nanochat-lesson-other-1", "nanochat-lesson-demo-2"]


def test_a_model_in_training_gets_no_job(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(store, monkeypatch)
    world.add()
    world.add("other")
    with Lease(store, "models/demo", "jobs.train.pretrain"):
        world.run(3)
        assert world.cluster.created == ["nanochat-lesson-other-1"]
    world.run(3)
    assert world.cluster.created == ["nanochat-lesson-other-1", NAME]


def test_a_result_that_does_not_reach_the_store_is_waited_for_and_then_tried_again(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(store, monkeypatch)
    world.writes = False
    lesson = world.add()
    world.run(120)
    assert world.cluster.created == [NAME]
    world.run(20)
    assert world.cluster.created == [NAME] * 2
    assert world.read() == lesson
    (warning,) = [record for record in caplog.records if record.message == "a lesson was interrupted"]
    assert (
        vars(warning)["reason"] == f"{NAME} ended, but its result is not in the store; do its pods use the same store?"
    )


def test_without_lessons_the_api_server_is_asked_once(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(store, monkeypatch, calls=["", "", "killed before"])
    world.run(100)
    assert world.cluster.faults == []


def test_the_role_allows_what_the_program_needs_and_nothing_else(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(store, monkeypatch, [*STARTS, "exit 1"])
    world.add()
    world.run(30)
    assert world.cluster.allowed == {
        (verb, what) for rule in RULES for what in rule["resources"] for verb in rule["verbs"]
    }


FAULTS = ["", "", "", "pod deleted", "stage deleted", "evicted", "preempted", "exit 138", "exit 1", "exit 3", "exit 4"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    calls=st.lists(st.sampled_from(("", "", "", *BROKEN_CALLS)), max_size=60),
    world=st.lists(st.sampled_from(FAULTS), max_size=40),
    cancels=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 3)), max_size=3),
)
def test_whatever_happens_every_lesson_ends(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    calls: list[str],
    world: list[str],
    cancels: list[tuple[int, int]],
) -> None:
    tried = World(FolderStore(tmp_path_factory.mktemp("store")), monkeypatch, world, calls)
    for _ in range(3):
        tried.add()
    for moment in range(2000):
        for when, number in cancels:
            if when == moment and not tried.read(number).done:
                tried.cancel(number)
        try:
            tried.run(1)
        except UserError:
            tried.cluster.sleep(1.0)
        if all(tried.read(number).done for number in (1, 2, 3)) and not tried.cluster.unfinished():
            break
    else:
        raise AssertionError("a lesson does not end")
    states = {tried.read(number).state for number in (1, 2, 3)}
    assert states <= {"promoted", "refused", "failed", "canceled"}
    assert cancels or "canceled" not in states


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", fullmatch=True), st.integers(1, 999_999))
def test_the_names_of_jobs_and_pods_are_names_of_hosts(model: str, number: int) -> None:
    name = job_name("nanochat-lesson", model, number)
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", f"{name}-master-0")
    assert len(f"{name}-master-0") <= 63
    assert name == job_name("nanochat-lesson", model, number)


def test_lessons_of_other_models_and_releases_have_other_names() -> None:
    models = ["demo", "Demo", "demo.", "demo-1", "demo_1", "demo.1", "x" * 200, "x" * 199, f"{'x' * 199}y"]
    prefixes = ["nanochat-lesson", f"{'n' * 50}-lesson", f"{'n' * 49}-lesson"]
    found = [job_name(prefix, model, number) for prefix in prefixes for model in models for number in (1, 11)]
    assert len(set(found)) == len(found)
    assert job_name("nanochat-lesson", "demo", 3) == "nanochat-lesson-demo-3"


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", "kind: PodTemplate", yaml.safe_dump({**TEMPLATE, "metadata": {"name": "a", "namespace": ""}})],
)
def test_a_file_that_is_no_template_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "lesson.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match="is no PodTemplate with a name and a namespace"):
        read_template(str(path))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_template(str(tmp_path / "lesson.yaml"))
