"""The pipeline runs its stages as PyTorchJobs. Its artifacts are the same, whatever fails meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from jobs.promotion.rules import Gate
from jobs.recipes import RECIPES, Recipe
from jobs.train.cluster.api import Api
from jobs.train.cluster.manifest import STATUS, SUSPENDED, Owner
from jobs.train.cluster.stage_jobs import StageJobs
from jobs.train.pipeline import Pipeline, PipelineSettings, Processes
from jobs.train.stages import StageRun
from nanochat_core.checkpoint import newest_checkpoint, promoted
from nanochat_core.errors import RetryableError, UserError
from nanochat_core.store import open_store
from tests.support.fake_cluster import CALL_FAULTS, NAMESPACE, UID, WORLD_FAULTS, FakeCluster, Killed, Object
from tests.support.tiny_training import TINY_PRETRAIN, TINY_SFT, Job

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MANIFEST: list[Object] = list(yaml.safe_load_all((ROOT / "jobs/train/speedrun.yaml").read_text()))
MODEL, JOB = "mine", "speedrun"
STAGES = ["tokenizer", "pretrain", "sft", "report"]
RECIPE = dataclasses.replace(
    RECIPES["demo"],
    tokenizer={"vocab-size": 300},
    pretrain=TINY_PRETRAIN | {"steps": 8, "warmup-steps": 2, "eval-every": 4, "eval-tokens": 500, "save-every": 4},
    sft=TINY_SFT | {"steps": 4, "eval-every": 4, "save-every": 2},
    train_conversations=200,
    gate=Gate(require=("bpb.bits_per_byte<=9",), no_worse=()),
)


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Little text, no compilation, few questions in the report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.recipes.DEMO_DOCUMENTS", 300)
        patch.setattr("jobs.recipes.DEMO_VALIDATION_DOCUMENTS", 30)
        for name, value in {
            "NANOCHAT_PRETRAIN_COMPILE": "false",
            "NANOCHAT_SFT_COMPILE": "false",
            "NANOCHAT_REPORT_ITEMS": "7",
            "NANOCHAT_REPORT_SAMPLES": "1",
            "OMP_NUM_THREADS": "1",
        }.items():
            patch.setenv(name, value)
        yield


@dataclasses.dataclass
class Recording(Processes):
    """Runs the stages as forked processes, and keeps the files that each leaves in the store."""

    home: Path
    files: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(1)

    def run(self, stage: StageRun) -> int:
        before = contents(self.home)
        module, *arguments = stage.arguments()
        code = Job(module, arguments, self.home.with_name("stages.log")).wait()
        self.files[stage.name] = {n: c for n, c in contents(self.home).items() if before.get(n) != c}
        return code


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@dataclasses.dataclass(frozen=True)
class Recorded:
    """An undisturbed run: the store before the first stage, the files of each stage, and the artifacts at the end."""

    prepared: dict[str, bytes]
    stages: dict[str, dict[str, bytes]]
    artifacts: dict[str, str]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    home = tmp_path_factory.mktemp("recorded") / "home"
    home.mkdir()
    recording = Recording(home)
    with own_signals():
        Pipeline(chosen(home, on="local"), RECIPE, recording).run()
    assert list(recording.files) == STAGES
    prepared = {name: content for name, content in contents(home).items() if name.startswith("data/")}
    return Recorded(prepared, recording.files, artifacts(home))


def chosen(home: Path, **changes: Any) -> PipelineSettings:
    given: dict[str, Any] = {"recipe": "demo", "model": MODEL, "home": str(home), "threads": 1, "on": "kubernetes"}
    return PipelineSettings(**(given | changes))


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def artifacts(home: Path) -> dict[str, str]:
    """Digests of everything that the pipeline makes, and the promoted revision."""
    store = open_store(str(home))
    report = json.loads(store.read(f"reports/{MODEL}/report.json"))
    report["promotion"].pop("time", None)
    files = {
        "tokenizer": store.read(f"tokenizers/{MODEL}/tokenizer.json"),
        "report": json.dumps(report, sort_keys=True).encode(),
    }
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    for stage in ("base", "sft"):
        checkpoint = newest_checkpoint(store, MODEL, stage)
        assert checkpoint is not None
        digests[stage] = checkpoint.weights_digest
    return digests | {"promoted": str(promoted(store, MODEL))}


class World:
    """A store, a cluster whose pods write to the store, and the Job that runs a dead pipeline again."""

    def __init__(self, home: Path, recorded: Recorded, calls: list[str], world: list[str], retries: int = 3) -> None:
        self.home, self.recorded, self.retries = home, recorded, retries
        self.write(recorded.prepared)
        self.cluster = FakeCluster(MANIFEST, self.work, calls, world)
        self.uid = UID
        self.done: list[str] = []

    def work(self, job: Object, how_much: str) -> None:
        """Write the files of a stage: all files at its "end", or only the first checkpoint after "some" of its work."""
        stage = job["metadata"]["labels"]["nanochat/stage"]
        files = self.recorded.stages[stage]
        steps = sorted({name.split("/")[3] for name in files if name.startswith(f"models/{MODEL}/")})
        if how_much == "end":
            assert stage not in self.done, f"{stage} was done before and runs again"
            self.write(files)
        elif how_much == "some" and len(steps) > 1:
            self.write({name: content for name, content in files.items() if f"/{steps[0]}/" in name})

    def write(self, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            path = self.home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def apply_again(self) -> None:
        """Delete the Job, unless it is gone, and apply its manifest."""
        self.uid += "x"
        self.cluster.delete_job()
        self.cluster.apply_job(self.uid)

    def run_once(self, recipe: Recipe = RECIPE) -> None:
        cluster = self.cluster
        api = Api(cluster.client(), NAMESPACE, clock=cluster.clock, sleep=cluster.sleep)
        runner = StageJobs(
            api,
            Owner(NAMESPACE, JOB, self.uid),
            nodes=2,
            retries=self.retries,
            clock=cluster.clock,
            sleep=cluster.sleep,
        )
        with own_signals():
            Pipeline(chosen(self.home), recipe, runner).run()

    def run(self, recipe: Recipe = RECIPE) -> str:
        """Run the pipeline as the Job does, until it ends: "done", or why it ended without a model."""
        for _ in range(200):
            try:
                self.run_once(recipe)
                return "done"
            except (Killed, RetryableError):
                pass
            except UserError as error:
                if self.cluster.job() is not None:
                    return str(error)
            except SystemExit as ended:
                if ended.code != 143:
                    return f"exit code {ended.code}"
            if (job := self.cluster.job()) is None:
                assert self.cluster.pytorch_jobs() == []
                self.apply_again()
            elif job["spec"].get("suspend"):
                self.cluster.suspend_job(False)
        raise AssertionError("the pipeline does not end")


Make = Callable[..., World]


@pytest.fixture
def make(recorded: Recorded, tmp_path: Path) -> Make:
    def made(calls: list[str] | None = None, world: list[str] | None = None, retries: int = 3) -> World:
        return World(tmp_path / "home", recorded, calls or [], world or [], retries)

    return made


def test_each_stage_is_one_pytorch_job_with_what_it_needs(make: Make, recorded: Recorded) -> None:
    world = make()
    assert world.run() == "done"
    assert artifacts(world.home) == recorded.artifacts
    assert world.cluster.created == [f"{JOB}-{stage}-1" for stage in STAGES]
    tokenizer, pretrain, sft, report = sorted(world.cluster.pytorch_jobs(), key=lambda job: STAGES.index(stage_of(job)))
    shape = [(replicas(job), job["spec"]["nprocPerNode"]) for job in (tokenizer, pretrain, sft, report)]
    assert shape == [([1], "1"), ([1, 1], "8"), ([1], "8"), ([1], "1")]
    assert arguments(pretrain)[:4] == ["python", "-m", "jobs.train.cluster.pod", "jobs.train.pretrain"]
    assert arguments(report)[:3] == ["python", "-m", "jobs.eval.report"]
    for job in world.cluster.pytorch_jobs():
        assert job["metadata"]["ownerReferences"][0]["uid"] == UID
        assert job["metadata"]["labels"]["app.kubernetes.io/component"] == "train"
        assert all(r["restartPolicy"] == "Never" for r in job["spec"]["pytorchReplicaSpecs"].values())
    reasons = ["Promoted"] + ["StageStarted"] * 4 + ["StageSucceeded"] * 4
    assert sorted(event["reason"] for event in world.cluster.events()) == reasons
    status = json.loads(world.cluster.job()["metadata"]["annotations"][STATUS])
    assert status == {"stage": "report", "attempt": "1", "state": "done", "message": ""}
    world.cluster.forget_events("StageSucceeded")  # as if the process had ended before it announced them
    assert world.run() == "done", "and a second time there is nothing to do"
    assert len(world.cluster.created) == 4
    assert sorted(event["reason"] for event in world.cluster.events()) == reasons


def test_the_role_allows_what_the_pipeline_needs_and_nothing_else(make: Make) -> None:
    world = make(world=["", "", "suspended"])
    assert world.run() == "done"
    (role,) = (document for document in MANIFEST if document["kind"] == "Role")
    granted = {(verb, what) for rule in role["rules"] for what in rule["resources"] for verb in rule["verbs"]}
    assert world.cluster.allowed == granted


def stage_of(job: Object) -> str:
    return str(job["metadata"]["labels"]["nanochat/stage"])


def replicas(job: Object) -> list[int]:
    return [replica["replicas"] for replica in job["spec"]["pytorchReplicaSpecs"].values()]


def arguments(job: Object) -> list[str]:
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    return list(container["args"])


@pytest.mark.parametrize(
    ("fault", "ending", "message"),
    [
        ("mistake", "exit code 1", "tokenizer: speedrun-tokenizer-1-master-0 ended with exit code 1; kubectl logs"),
        ("out of memory", "exit code 2", "tokenizer: speedrun-tokenizer-1-master-0 needed more memory than its limit"),
    ],
)
def test_a_mistake_is_not_tried_again(make: Make, fault: str, ending: str, message: str) -> None:
    world = make(world=["", "", fault])
    assert world.run() == ending
    assert world.cluster.created == [f"{JOB}-tokenizer-1"]
    (failure,) = [event for event in world.cluster.events() if event["reason"] == "StageFailed"]
    assert failure["type"] == "Warning"
    assert failure["message"].startswith(message)


# What happens in each moment of a stage that is not disturbed. The stage ends in the third moment.
UNDISTURBED = ["", "", ""]


@pytest.mark.parametrize("fault", ["preempted", "evicted", "lost rank"])
def test_a_preempted_stage_is_tried_again_with_growing_delays(make: Make, recorded: Recorded, fault: str) -> None:
    world = make(world=[*UNDISTURBED, *["", "", fault, ""] * 3])
    started = world.cluster.now
    assert world.run() == "done"
    assert world.cluster.created[1:5] == [f"{JOB}-pretrain-{attempt}" for attempt in (1, 2, 3, 4)]
    assert world.cluster.now - started > 10 + 20 + 40
    assert artifacts(world.home) == recorded.artifacts


def test_a_stage_whose_result_does_not_reach_the_store_fails(recorded: Recorded, tmp_path: Path) -> None:
    elsewhere = dataclasses.replace(recorded, stages=recorded.stages | {"tokenizer": {}})
    world = World(tmp_path / "home", elsewhere, [], [])
    started = world.cluster.now
    problem = "speedrun-tokenizer-1 succeeded, but its result is not in the store after 120 s"
    assert world.run().startswith(problem)
    assert world.cluster.now - started >= 120
    assert [event["reason"] for event in world.cluster.events()] == ["StageStarted", "StageFailed"]
    assert world.cluster.created == [f"{JOB}-tokenizer-1"]


def test_a_stage_that_is_always_preempted_fails_after_the_retries(make: Make) -> None:
    world = make(world=[*UNDISTURBED, *["", "", "preempted", ""] * 10], retries=2)
    reason = "speedrun-pretrain-3-worker-0 ended with exit code 143"
    assert world.run() == (
        f"pretrain ended early 3 times without a new checkpoint, the last time because {reason}; --retries sets how "
        "often a stage may end early"
    )
    assert world.cluster.created[1:] == [f"{JOB}-pretrain-{attempt}" for attempt in (1, 2, 3)]


def test_attempts_that_make_progress_do_not_count(make: Make, recorded: Recorded) -> None:
    world = make(world=[*UNDISTURBED, *["", "", "preempted with progress", ""] * 2], retries=1)
    assert world.run() == "done"
    assert artifacts(world.home) == recorded.artifacts


def test_suspending_the_job_suspends_its_stage_and_resuming_it_goes_on(make: Make, recorded: Recorded) -> None:
    world = make(world=["", "", "suspended"])
    with pytest.raises(SystemExit):
        world.run_once()
    (stage,) = world.cluster.unfinished()
    assert stage["spec"]["runPolicy"]["suspend"]
    world.cluster.suspend_job(False)
    assert world.run() == "done"
    assert world.cluster.created == [f"{JOB}-{stage}-1" for stage in STAGES]
    assert artifacts(world.home) == recorded.artifacts


def test_stages_in_a_queue_start_when_kueue_admits_them(make: Make, recorded: Recorded) -> None:
    world = make()
    world.cluster.queue_stages("training", moments=5)
    assert world.run() == "done"
    assert world.cluster.created == [f"{JOB}-{stage}-1" for stage in STAGES]
    assert artifacts(world.home) == recorded.artifacts


def test_suspending_the_job_leaves_a_stage_in_its_queue(make: Make, recorded: Recorded) -> None:
    world = make(world=["", "", "suspended"])
    world.cluster.queue_stages("training", moments=5)
    with pytest.raises(SystemExit):
        world.run_once()
    job = world.cluster.job()
    assert job is not None
    assert json.loads(job["metadata"]["annotations"][STATUS]) == {
        "stage": "tokenizer",
        "attempt": "1",
        "state": "suspended",
        "message": "it waits in the queue training of Kueue; kubectl describe workloads says why",
    }
    (stage,) = world.cluster.unfinished()
    assert stage["spec"]["runPolicy"]["suspend"], "Kueue has not admitted it yet"
    assert SUSPENDED not in stage["metadata"]["annotations"], "the next process must not resume it"
    world.cluster.suspend_job(False)
    assert world.run() == "done"
    assert world.cluster.created == [f"{JOB}-{stage}-1" for stage in STAGES]
    assert artifacts(world.home) == recorded.artifacts


def test_a_job_that_is_deleted_takes_its_stages_along(make: Make, recorded: Recorded) -> None:
    world = make(world=["", "", "canceled"])
    with pytest.raises(SystemExit):
        world.run_once()
    assert world.cluster.pytorch_jobs() == []
    world.apply_again()
    assert world.run() == "done"
    assert artifacts(world.home) == recorded.artifacts


def test_a_name_that_a_deleted_job_still_holds_is_waited_for(make: Make, recorded: Recorded) -> None:
    world = make()
    world.cluster.hold_name(f"{JOB}-tokenizer-1", moments=3)
    started = world.cluster.now
    assert world.run() == "done"
    assert world.cluster.now - started > 3 * 5
    assert world.cluster.created == [f"{JOB}-{stage}-1" for stage in STAGES]
    assert artifacts(world.home) == recorded.artifacts


def test_a_server_that_is_away_for_minutes_is_waited_for_and_one_that_stays_away_ends_the_attempt(make: Make) -> None:
    world = make(calls=["unavailable"] * 9)
    assert world.run() == "done"
    world = make(calls=["unavailable", "broken before"] * 100)
    with pytest.raises(RetryableError, match="the API server does not list PyTorchJobs"):
        world.run_once()


@pytest.mark.timeout(900)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    calls=st.lists(st.sampled_from(("", "", "", *CALL_FAULTS)), max_size=80),
    world=st.lists(st.sampled_from(("", *WORLD_FAULTS)), max_size=30),
)
def test_whatever_happens_the_artifacts_are_the_same_or_the_failure_is_clear(
    make: Make, recorded: Recorded, calls: list[str], world: list[str]
) -> None:
    tried = make(calls, world)
    shutil.rmtree(tried.home)
    tried.write(recorded.prepared)
    ending = tried.run()
    faults = tried.cluster.faults
    event(ending.partition(" ")[0])
    if ending == "done":
        assert artifacts(tried.home) == recorded.artifacts
        assert not tried.cluster.unfinished()
        return
    assert not tried.cluster.unfinished(), "a failed pipeline leaves nothing running"
    if ending == "exit code 1":
        assert "mistake" in faults
    elif ending == "exit code 2":
        assert "out of memory" in faults
    else:
        assert "times without a new checkpoint, the last time because" in ending
    failures = [event["message"] for event in tried.cluster.events() if event["reason"] == "StageFailed"]
    assert failures
    # Once nothing fails any more, deleting the Job and applying its manifest again finishes the work.
    tried.cluster.end_faults()
    tried.apply_again()
    assert tried.run() == "done"
    assert artifacts(tried.home) == recorded.artifacts
