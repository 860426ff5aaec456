"""Reinforcement learning and evaluation as PyTorchJobs with an S3 server as their store.

The tests run the server as a process on this machine, so the nodes of the cluster must be able to reach this machine.
At the start, the server has a copy of the trained store in the folder NANOCHAT_TEST_STORE. ``test_kubernetes.py`` puts
the store into that folder.
"""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from test_kubernetes import RESTRICTED, get, new_namespace, succeed

from tests.support.commands import ROOT, run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

BUCKET = "nanochat"
KEY, SECRET = "test", "testtest"
# These flags make the job short enough for two cores: it has fewer steps and fewer problems.
SMALLER_RL = ("--steps=4", "--examples=4", "--samples=4", "--held-out=8", "--eval-samples=2", "--save-every=2")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder of a bucket that contains the trained store, and the address of the S3 server."""
    trained = os.environ.get("NANOCHAT_TEST_STORE")
    if not trained or not Path(trained, "models/demo/PROMOTED").is_file():
        pytest.skip("NANOCHAT_TEST_STORE names no store with a trained demo model")
    server = shutil.which("versitygw")
    if server is None:
        pytest.skip("versitygw, the S3 server of these tests, is not installed")
    root = tmp_path_factory.mktemp("s3")
    address = f"{_own_address()}:{_free_port()}"
    process = subprocess.Popen(
        [server, "--port", address, "posix", str(root)],
        env={**os.environ, "ROOT_ACCESS_KEY": KEY, "ROOT_SECRET_KEY": SECRET},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for_server(address, process)
        _upload(Path(trained), f"http://{address}")
        yield root / BUCKET, f"http://{address}"
    finally:
        process.terminate()
        process.wait(10)


def _upload(folder: Path, endpoint: str) -> None:
    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1"
    )
    client.create_bucket(Bucket=BUCKET)
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), BUCKET, path.relative_to(folder).as_posix())


def _own_address() -> str:
    """The address under which the cluster can reach this machine."""
    config = json.loads(run("kubectl", "config", "view", "--minify", "-o", "json").stdout)
    api = urllib.parse.urlsplit(config["clusters"][0]["cluster"]["server"])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((api.hostname, api.port or 443))
        return str(probe.getsockname()[0])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _wait_for_server(address: str, process: subprocess.Popen[bytes]) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"versitygw does not listen on {address}")


@pytest.fixture(scope="module")
def namespace(store: tuple[Path, str]) -> Iterator[str]:
    """A namespace for restricted pods, with the Secret that tells jobs to use the bucket."""
    with new_namespace(RESTRICTED.format("enforce")) as name:
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "nanochat-store"},
            "stringData": {
                "NANOCHAT_HOME": f"s3://{BUCKET}",
                "AWS_ACCESS_KEY_ID": KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": store[1],
            },
        }
        run("kubectl", "-n", name, "apply", "-f", "-", stdin=yaml.safe_dump(secret))
        yield name


def apply(namespace: str, manifest: str, more: tuple[str, ...] = ()) -> None:
    """Apply a manifest. Each flag in ``more`` replaces the job's flag of the same name."""
    documents: list[dict[str, Any]] = list(yaml.safe_load_all((ROOT / manifest).read_text()))
    replaced = {flag.partition("=")[0] for flag in more}
    for document in documents:
        if document["kind"] == "PyTorchJob":
            (container,) = document["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
            container["args"] = [arg for arg in container["args"] if arg.partition("=")[0] not in replaced] + [*more]
    run("kubectl", "-n", namespace, "apply", "-f", "-", stdin=yaml.safe_dump_all(documents))


def test_reinforcement_goes_on_from_what_lies_in_the_bucket(namespace: str, store: tuple[Path, str]) -> None:
    apply(namespace, "jobs/train/rl-cpu.yaml", SMALLER_RL)
    succeed(namespace, "rl-cpu", 900)
    meta = json.loads((store[0] / "models/demo/rl/step_000004/meta.json").read_text())
    assert meta["finished"]
    assert meta["base"].startswith("sft/")
    assert [point["step"] for point in meta["history"] if "heldout_reward" in point] == [0, 4]


def test_the_report_of_an_evaluation_lies_in_the_bucket(namespace: str, store: tuple[Path, str]) -> None:
    apply(namespace, "jobs/eval/report-cpu.yaml", ("--items=40",))
    succeed(namespace, "report-cpu", 900)
    report = json.loads((store[0] / "reports/demo/report.json").read_text())
    assert report["rl"]["revision"] == "rl/step_000004", "about the newest of the last stage"
    assert (store[0] / "reports/demo/report.md").read_text().startswith("# ")
    for job in ("rl-cpu", "report-cpu"):
        (pod,) = get(namespace, "pods", f"--selector=training.kubeflow.org/job-name={job}")["items"]
        assert pod["status"]["containerStatuses"][0]["restartCount"] == 0
