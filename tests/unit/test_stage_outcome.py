"""How the end of a stage's pods is judged, and why pods wait."""

from typing import Any

import pytest

from jobs.train.cluster.manifest import Object, Owner, stage_job
from jobs.train.cluster.outcome import Outcome, outcome_of, still_running, waiting_reasons
from jobs.train.stages import StageRun
from nanochat_core.errors import UserError

DISRUPTED = {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}


def pod(name: str, phase: str = "Failed", terminated: Object | None = None, **status: Any) -> Object:
    if terminated is not None:
        status["containerStatuses"] = [{"name": "pytorch", "state": {"terminated": terminated}}]
    return {"metadata": {"name": name}, "status": {"phase": phase, **status}}


@pytest.mark.parametrize(
    ("pods", "outcome"),
    [
        ([], Outcome(0, "its pods are gone")),
        ([pod("a", terminated={"exitCode": 143})], Outcome(0, "a ended with exit code 143")),
        ([pod("a", terminated={"exitCode": 138})], Outcome(0, "a ended with exit code 138")),
        ([pod("a", reason="Evicted")], Outcome(0, "a was stopped: Evicted")),
        ([pod("a")], Outcome(0, "a was stopped: no reason is known")),
        ([pod("a", terminated={"exitCode": 137})], Outcome(0, "a ended with exit code 137")),
        ([pod("a", "Running")], Outcome(0, "its pods are gone")),
        ([pod("a", terminated={"exitCode": 3})], Outcome(3, "a ended with exit code 3; kubectl logs a says why")),
        ([pod("a", terminated={"exitCode": 127})], Outcome(127, "a ended with exit code 127; kubectl logs a says why")),
        (
            [pod("a", terminated={"exitCode": 137, "reason": "OOMKilled"})],
            Outcome(2, "a needed more memory than its limit; raise the limit in its PodTemplate"),
        ),
        (
            # The second pod failed first. The first pod then lost contact with the ranks of the second pod.
            [pod("a", terminated={"exitCode": 138}), pod("b", terminated={"exitCode": 1})],
            Outcome(1, "b ended with exit code 1; kubectl logs b says why"),
        ),
        (
            # The node was shut down, and what the program did then does not matter.
            [pod("a", terminated={"exitCode": 1}, conditions=[DISRUPTED])],
            Outcome(0, "a was stopped: TerminationByKubelet"),
        ),
        (
            [pod("a", "Succeeded", {"exitCode": 0}), pod("b", terminated={"exitCode": 143})],
            Outcome(0, "b ended with exit code 143"),
        ),
    ],
)
def test_outcome(pods: list[Object], outcome: Outcome) -> None:
    assert outcome_of(pods) == outcome
    assert outcome.may_succeed == (outcome.exit_code == 0)


def test_pods_run_until_they_have_succeeded_or_failed() -> None:
    pods = [pod("d", "Succeeded"), pod("c", "Failed"), pod("b", "Running"), pod("a", "Pending"), pod("e", "Unknown")]
    assert still_running(pods, now=0.0) == ["a", "b", "e"]


def test_a_pod_that_should_have_ended_minutes_ago_is_on_a_lost_node() -> None:
    ending = pod("a", "Running")
    ending["metadata"]["deletionTimestamp"] = "1970-01-01T00:10:00Z"
    assert still_running([ending], now=899.0) == ["a"]
    assert still_running([ending], now=901.0) == []


def test_reasons_to_wait_are_those_of_the_scheduler_and_the_nodes() -> None:
    full = {
        "type": "PodScheduled",
        "status": "False",
        "message": "0/3 nodes are available",
    }
    pull = {"name": "pytorch", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}}
    usual = {"name": "pytorch", "state": {"waiting": {"reason": "ContainerCreating"}}}
    pods = [
        pod("b", "Pending", conditions=[full]),
        pod("a", "Pending", containerStatuses=[pull]),
        pod("c", "Pending", initContainerStatuses=[usual], containerStatuses=[usual]),
        pod("d", "Running", conditions=[{"type": "PodScheduled", "status": "True"}]),
    ]
    assert waiting_reasons(pods) == [
        "a: ImagePullBackOff not found",
        "b: 0/3 nodes are available",
    ]


OWNER = Owner("n", "run", "u")
TEMPLATE: Object = {
    "metadata": {
        "name": "run-training",
        "labels": {"kueue.x-k8s.io/queue-name": "gold"},
        "annotations": {"team": "a", "kubectl.kubernetes.io/last-applied-configuration": "{}"},
    },
    "template": {
        "metadata": {"creationTimestamp": None, "labels": {"app": "train"}},
        "spec": {
            "restartPolicy": "Always",
            "containers": [{"name": "pytorch", "resources": {"limits": {"nvidia.com/gpu": "4"}}}],
        },
    },
}


def test_labels_and_annotations_of_the_template_pass_through() -> None:
    job = stage_job(StageRun("sft", "jobs.train.sft", {}, "node"), OWNER, TEMPLATE, attempt=2, pods=1)
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gold"
    assert job["metadata"]["annotations"] == {"team": "a", "nanochat/attempt": "2", "nanochat/progress": ""}
    assert "controller" not in job["metadata"]["ownerReferences"][0], "Kueue would count no quota for the PyTorchJob"
    assert job["spec"]["nprocPerNode"] == "4"
    pod = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    assert pod["metadata"] == {"labels": {"app": "train", "nanochat/job": "run"}}
    assert "restartPolicy" not in pod["spec"], "the operator sets it, and warns of any other"
    assert "args" not in TEMPLATE["template"]["spec"]["containers"][0], "the template itself is unchanged"


def test_a_stage_starts_over_only_until_it_has_a_checkpoint_of_its_own() -> None:
    def stage(found: str) -> StageRun:
        return StageRun(
            "sft", "jobs.train.sft", {"steps": 3, "compile": False}, "node", start_over=True, progress=lambda: found
        )

    stages = [stage(""), stage("sft/step_000001")]
    arguments = ["jobs.train.sft", "--steps=3", "--no-compile"]
    assert [stage.arguments() for stage in stages] == [[*arguments, "--no-resume"], arguments]
    assert stages[0].digest == stages[1].digest


@pytest.mark.parametrize("text", ["", "run", "n/run", "n/run/", "n/run/u/v"])
def test_a_pipeline_outside_of_a_job_is_told_what_to_do(text: str) -> None:
    with pytest.raises(UserError, match="start the pipeline with a manifest"):
        Owner.parse(text)


def test_a_name_that_is_too_long_for_pods_is_refused() -> None:
    owner = Owner("n", "r" * 50, "u")
    with pytest.raises(UserError, match="too long for its stages' pods"):
        stage_job(StageRun("tokenizer", "jobs.train.tokenizer", {}, "data"), owner, TEMPLATE, attempt=1, pods=1)
