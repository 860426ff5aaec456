"""A Kubernetes API server, training operator, Kueue and garbage collector inside one process, with scripted faults.

The client library works as with a real server; only its connection pool is replaced. Time passes only while the client
waits. Two scripts are lists of words that name faults. Each call takes the next word of the first script, and each wait
takes the next word of the second script. After the end of the scripts, nothing goes wrong any more.
"""

import copy
import datetime
import io
import json
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any

import urllib3
from kubernetes.client import ApiClient, Configuration

Object = dict[str, Any]

NAMESPACE, UID = "research", "5b1c"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
# What may happen to a call of the client.
CALL_FAULTS = (
    "unavailable",  # the server answers 503
    "broken before",  # the connection breaks before the server reads the request
    "broken after",  # the connection breaks before the client reads the answer
    "killed before",  # the client's process is killed before the server reads the request
    "killed after",  # the client's process is killed before it reads the answer
    "stopped",  # the client's process gets SIGTERM
)
# What may happen while the client waits.
WORLD_FAULTS = (
    "preempted",  # a pod is told to end, and has saved nothing
    "preempted with progress",
    "preempted at the end",  # all the work is done, but not reported
    "evicted",  # a pod fails without an exit code
    "lost rank",
    "pod deleted",  # the operator makes the pod again
    "mistake",
    "out of memory",
    "watch expired",
    "watch expired later",
    "watch broken",
    "stage deleted",  # somebody deletes a PyTorchJob
    "slow end",  # the pods of the next failure end later than the PyTorchJob
    "suspended",  # somebody suspends the Job
    "canceled",  # somebody deletes the Job
)


class Killed(BaseException):
    """Raised in the client's code to imitate the sudden end of the client's process."""


class FakeCluster:
    """One namespace in which a manifest with a Role and, if there are any, a Job and PodTemplates is applied.

    Attributes:
        job_name: name of the Job; empty if there is none.
        allowed: verbs and resources of the Role that the client has used.
        works: called with a PyTorchJob and the share of the work that its pods have done: ``"end"`` (all of the work),
            ``"some"`` or ``"nothing"``; or with the fault ``exit <code>`` of its pod.
        created: names of all PyTorchJobs that were ever created.
        faults: what has happened, in order.
    """

    def __init__(
        self,
        manifest: list[Object],
        works: Callable[[Object, str], None],
        calls: Iterable[str] = (),
        world: Iterable[str] = (),
    ) -> None:
        self.works, self._call_faults, self._world_faults = works, iter(calls), iter(world)
        self.now = 1_750_000_000.0
        self.faults: list[str] = []
        self.created: list[str] = []
        self.allowed: set[tuple[str, str]] = set()
        self.slow_end = False
        self._held: dict[str, int] = {}
        self._queue_moments = 0
        self._queued: dict[str, int] = {}
        self._version = 100
        self._history: list[tuple[int, Object]] = []
        self._objects: dict[tuple[str, str], Object] = {}
        by_kind = {kind: [d for d in manifest if d["kind"] == kind] for kind in ("Job", "Role", "PodTemplate")}
        (self._role,) = by_kind["Role"]
        self.job_name = ""
        for self._manifest in by_kind["Job"]:
            self.job_name = self._manifest["metadata"]["name"]
            self.apply_job(UID)
        for template in by_kind["PodTemplate"]:
            self._put("podtemplates", template)

    # The following methods are actions of people and of the cluster's controllers.

    def apply_job(self, uid: str) -> None:
        metadata = self._manifest["metadata"] | {"namespace": NAMESPACE, "uid": uid}
        self._put("jobs", self._manifest | {"metadata": metadata})

    def delete_job(self) -> None:
        """Delete the Job and, as the garbage collector does, everything that it owns. Without a Job, do nothing."""
        if self.job() is None:
            return
        owner = self._objects.pop(("jobs", self.job_name))["metadata"]["uid"]
        for job in self.pytorch_jobs():
            if owner in [reference["uid"] for reference in job["metadata"]["ownerReferences"]]:
                self.delete_pytorch_job(job["metadata"]["name"])

    def hold_name(self, name: str, moments: int) -> None:
        """Create a finished PyTorchJob of a deleted Job, and delete it after ``moments`` waits of the client."""
        metadata = {"name": name, "labels": {}, "annotations": {}, "ownerReferences": []}
        status = {"conditions": [{"type": "Succeeded", "status": "True"}]}
        self._put("pytorchjobs", {"metadata": metadata, "status": status})
        self._held[name] = moments

    def queue_stages(self, queue: str, moments: int) -> None:
        """Label the PodTemplates with a queue of Kueue, which admits each PyTorchJob after ``moments`` waits."""
        self._queue_moments = moments
        for template in self._all("podtemplates"):
            template["metadata"].setdefault("labels", {})[QUEUE_LABEL] = queue
            self._put("podtemplates", template)

    def suspend_job(self, suspended: bool) -> None:
        job = self._objects["jobs", self.job_name]
        job["spec"]["suspend"] = suspended
        self._put("jobs", job)

    def suspend_pytorch_job(self, name: str, suspended: bool) -> None:
        job = self._objects["pytorchjobs", name]
        job["spec"]["runPolicy"]["suspend"] = suspended
        self._put("pytorchjobs", job)

    def job(self) -> Object | None:
        return self._objects.get(("jobs", self.job_name))

    def pytorch_jobs(self) -> list[Object]:
        return self._all("pytorchjobs")

    def pods(self) -> list[Object]:
        return self._all("pods")

    def leave_pod(self, pod: Object) -> None:
        """Put the pod of a deleted PyTorchJob back, which the garbage collector has not seen yet."""
        self._put("pods", pod)

    def collect_pod(self, name: str) -> None:
        """Delete a pod that :meth:`leave_pod` has put back."""
        del self._objects["pods", name]

    def events(self) -> list[Object]:
        return self._all("events")

    def forget_events(self, reason: str) -> None:
        for event in self.events():
            if event["reason"] == reason:
                del self._objects["events", event["metadata"]["name"]]

    def unfinished(self) -> list[Object]:
        return [job for job in self.pytorch_jobs() if not {"Succeeded", "Failed"} & self.conditions(job)]

    @staticmethod
    def conditions(job: Object) -> set[str]:
        return {c["type"] for c in job.get("status", {}).get("conditions", ()) if c["status"] == "True"}

    def delete_pytorch_job(self, name: str) -> None:
        """Delete a PyTorchJob. Its pods are told to end, and are gone a moment later."""
        job = self._objects.pop(("pytorchjobs", name))
        for pod in self._pods(name):
            self._put("pods", pod | {"metadata": pod["metadata"] | {"deletionTimestamp": self._time()}})
        self._version += 1
        self._history.append((self._version, {"type": "DELETED", "object": job}))

    def _pods(self, name: str) -> list[Object]:
        return [p for p in self._all("pods") if p["metadata"]["labels"]["training.kubeflow.org/job-name"] == name]

    def _all(self, plural: str) -> list[Object]:
        return [copy.deepcopy(value) for (kind, _), value in sorted(self._objects.items()) if kind == plural]

    def _put(self, plural: str, value: Object) -> Object:
        name = value["metadata"]["name"]
        self._version += 1
        value = copy.deepcopy(value)
        value["metadata"]["resourceVersion"] = str(self._version)
        event = "MODIFIED" if (plural, name) in self._objects else "ADDED"
        self._objects[plural, name] = value
        if plural == "pytorchjobs":
            self._history.append((self._version, {"type": event, "object": copy.deepcopy(value)}))
        return value

    def end_faults(self) -> None:
        """From now on, nothing goes wrong any more."""
        self._call_faults = self._world_faults = iter(())

    # The following methods let time pass.

    def _time(self) -> str:
        return datetime.datetime.fromtimestamp(self.now, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._pass_time(next(self._world_faults, ""))

    def _pass_time(self, fault: str) -> None:
        """Do what the cluster does by itself while the client waits once."""
        for name in list(self._held):
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]
                self.delete_pytorch_job(name)
        for job in self.pytorch_jobs():
            if (name := job["metadata"]["name"]) in self._queued:
                self._queued[name] -= 1
                if not self._queued[name]:
                    del self._queued[name]
                    job["spec"]["runPolicy"]["suspend"] = False
                    self._put("pytorchjobs", job)
        for pod in self._all("pods"):
            if "deletionTimestamp" in pod["metadata"]:
                del self._objects["pods", pod["metadata"]["name"]]
        if fault == "slow end":
            self.slow_end = True
        if fault == "stage deleted" and (jobs := self.unfinished()):
            self._happened(fault)
            self.delete_pytorch_job(jobs[0]["metadata"]["name"])
        if fault in ("suspended", "canceled") and self.job() is not None:
            self._happened(fault)
            if fault == "canceled":
                self.delete_job()
            else:
                self.suspend_job(True)
            raise SystemExit(143)
        for job in self.pytorch_jobs():
            self._reconcile(job, fault)

    def _happened(self, fault: str) -> None:
        self.faults.append(fault)

    def _reconcile(self, job: Object, fault: str) -> None:
        """One step of the training operator, the scheduler and the pods for one PyTorchJob."""
        name, conditions = job["metadata"]["name"], self.conditions(job)
        pods = self._pods(name)
        if conditions & {"Succeeded", "Failed"}:
            for pod in pods:  # cleanPodPolicy: Running
                if pod["status"]["phase"] in ("Pending", "Running"):
                    del self._objects["pods", pod["metadata"]["name"]]
            return
        if job["spec"]["runPolicy"].get("suspend"):
            for pod in pods:
                del self._objects["pods", pod["metadata"]["name"]]
            if "Suspended" not in conditions:
                self._set_condition(job, "Suspended")
            return
        if not pods:
            made = [
                _pod(f"{name}-{replica.lower()}-{number}", name, spec["template"]["metadata"])
                for replica, spec in job["spec"]["pytorchReplicaSpecs"].items()
                for number in range(spec["replicas"])
            ]
            others = [pod for pod in self._all("pods") if pod["status"]["phase"] in ("Pending", "Running")]
            assert _writes_to(made[0]) not in map(_writes_to, others), "two attempts run at the same time"
            for pod in made:
                self._put("pods", pod)
            self._set_condition(job, "Created")
        elif any(pod["status"]["phase"] == "Pending" for pod in pods):
            for pod in pods:
                self._put("pods", pod | {"status": {"phase": "Running"}})
            self._set_condition(job, "Running")
        elif fault == "pod deleted":
            self._happened(fault)
            self._put("pods", pods[0] | {"status": {"phase": "Pending"}})
        elif fault in ("preempted", "preempted with progress", "preempted at the end"):
            self.works(job, {"preempted": "nothing", "preempted with progress": "some"}.get(fault, "end"))
            self._fail(job, pods, fault, {"exitCode": 143})
        elif fault == "evicted":
            self._fail(job, pods, fault, None)
        elif fault == "lost rank":
            self._fail(job, pods, fault, {"exitCode": 138})
        elif fault == "mistake":
            self._fail(job, pods, fault, {"exitCode": 1})
        elif fault.startswith("exit "):
            self.works(job, fault)
            self._fail(job, pods, fault, {"exitCode": int(fault.removeprefix("exit "))})
        elif fault == "out of memory":
            self._fail(job, pods, fault, {"exitCode": 137, "reason": "OOMKilled"})
        else:
            self.works(job, "end")
            for pod in pods:
                self._put("pods", pod | {"status": _ended("Succeeded", {"exitCode": 0})})
            self._set_condition(job, "Succeeded")

    def _fail(self, job: Object, pods: list[Object], fault: str, ended: Object | None) -> None:
        """The last pod ends. The operator deletes the others immediately or, after "slow end", a moment later."""
        self._happened(fault)
        self._put("pods", pods[-1] | {"status": _ended("Failed", ended)})
        for pod in pods[:-1]:
            if not self.slow_end:
                del self._objects["pods", pod["metadata"]["name"]]
        self.slow_end = False
        self._set_condition(job, "Failed")

    def _set_condition(self, job: Object, condition: str) -> None:
        status = job.setdefault("status", {"conditions": []})
        gone = {"Created": {"Suspended"}, "Suspended": {"Created", "Running"}}.get(condition, set())
        kept = [c for c in status["conditions"] if c["type"] not in {condition} | gone]
        status["conditions"] = [*kept, {"type": condition, "status": "True", "lastTransitionTime": self._time()}]
        self._put("pytorchjobs", job)

    # The following methods are the API server.

    def client(self) -> ApiClient:
        """A client of the library whose connections end here."""
        client = ApiClient(Configuration(host="http://cluster"))
        connections: Any = self
        client.rest_client.pool_manager = connections
        return client

    def request(self, method: str, url: str, body: str | None = None, **_options: Any) -> urllib3.HTTPResponse:
        """Answer one request, in place of urllib3's pool of connections."""
        fault = next(self._call_faults, "")
        if fault:
            self._happened(fault)
        if fault == "unavailable":
            return _response(503, {"kind": "Status", "message": "the server is starting", "reason": "Unavailable"})
        if fault == "broken before":
            raise urllib3.exceptions.ProtocolError("connection reset")
        if fault == "killed before":
            raise Killed
        if fault == "stopped":
            raise SystemExit(143)
        response = self._answer(method, urllib.parse.urlsplit(url), json.loads(body) if body else {})
        if fault == "broken after":
            raise urllib3.exceptions.ProtocolError("connection reset")
        if fault == "killed after":
            raise Killed
        return response

    def _answer(self, method: str, url: urllib.parse.SplitResult, body: Object) -> urllib3.HTTPResponse:
        _, _, path = url.path.partition(f"/namespaces/{NAMESPACE}/")
        plural, _, name = path.partition("/")
        query = dict(urllib.parse.parse_qsl(url.query))
        verb = {
            "POST": "create",
            "PATCH": "patch",
            "DELETE": "delete",
            "GET": "get" if name else "watch" if query.get("watch") else "list",
        }
        if not self._is_allowed(verb[method], plural, name):
            message = f"the service account cannot {verb[method]} {plural} {name}"
            return _response(403, {"kind": "Status", "reason": "Forbidden", "message": message})
        if method == "POST":
            name = body["metadata"]["name"]
            if (plural, name) in self._objects:
                return _response(
                    409, {"kind": "Status", "reason": "AlreadyExists", "message": f"{name} already exists"}
                )
            if plural == "pytorchjobs":
                self.created.append(name)
                body["metadata"] |= {"namespace": NAMESPACE, "uid": f"uid-{self._version}"}
                if QUEUE_LABEL in body["metadata"]["labels"]:
                    body["spec"]["runPolicy"]["suspend"] = True
                    self._queued[name] = self._queue_moments
            return _response(201, self._put(plural, body))
        if not name:
            selector = dict(part.split("=") for part in query.get("labelSelector", "").split(",") if part)
            if query.get("watch"):
                return self._watch(int(query["resourceVersion"]), float(query["timeoutSeconds"]))
            items = [v for v in self._all(plural) if selector.items() <= v["metadata"].get("labels", {}).items()]
            return _response(200, {"kind": "List", "metadata": {"resourceVersion": str(self._version)}, "items": items})
        if (plural, name) not in self._objects:
            return _response(404, {"kind": "Status", "reason": "NotFound", "message": f"{plural} {name} not found"})
        if method == "DELETE":
            if body["preconditions"]["uid"] != self._objects[plural, name]["metadata"]["uid"]:
                return _response(409, {"kind": "Status", "reason": "Conflict", "message": "another uid"})
            self.delete_pytorch_job(name)
            return _response(200, {"kind": "Status"})
        if method == "PATCH":
            return _response(200, self._put(plural, _merged(self._objects[plural, name], body)))
        return _response(200, self._objects[plural, name])

    def _is_allowed(self, verb: str, plural: str, name: str) -> bool:
        for rule in self._role["rules"]:
            named = "resourceNames" not in rule or name in rule["resourceNames"]
            if named and verb in rule["verbs"] and plural in rule["resources"]:
                self.allowed.add((verb, plural))
                return True
        return False

    def _watch(self, version: int, seconds: float) -> urllib3.HTTPResponse:
        fault = next(self._world_faults, "")
        if fault == "watch expired":
            self._happened(fault)
            return _response(410, {"kind": "Status", "reason": "Expired", "message": "too old resource version"})
        if not (changes := [event for number, event in self._history if number > version]):
            self.now += min(seconds, 20.0)
            self._pass_time(fault)
            changes = [event for number, event in self._history if number > version]
        if fault == "watch broken":
            self._happened(fault)
            raise urllib3.exceptions.ProtocolError("connection broken")
        if fault == "watch expired later":
            self._happened(fault)
            status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
            changes = [{"type": "ERROR", "object": status}]
        lines = "".join(json.dumps(change) + "\n" for change in changes)
        return _response(200, lines)


def _pod(name: str, job: str, metadata: Object) -> Object:
    labels = metadata["labels"] | {"training.kubeflow.org/job-name": job}
    return {"metadata": metadata | {"name": name, "labels": labels}, "status": {"phase": "Pending"}}


def _writes_to(pod: Object) -> tuple[str | None, str | None]:
    """The pipeline's Job and the lesson's model, which tell what a pod writes to."""
    metadata = pod["metadata"]
    return metadata["labels"].get("nanochat/job"), metadata.get("annotations", {}).get("nanochat/model")


def _ended(phase: str, terminated: Object | None) -> Object:
    if terminated is None:
        return {"phase": phase, "reason": "Evicted"}
    return {"phase": phase, "containerStatuses": [{"name": "pytorch", "state": {"terminated": terminated}}]}


def _merged(value: Object, patch: Object) -> Object:
    """Applies a JSON Merge Patch (RFC 7396)."""
    result = copy.deepcopy(value)
    for key, part in patch.items():
        if part is None:
            result.pop(key, None)
        else:
            result[key] = _merged(result.get(key) or {}, part) if isinstance(part, dict) else part
    return result


class _Body(io.BytesIO):
    """The body of an answer. It is closed once it has been read to the end, as on a real connection."""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if self.tell() == len(self.getbuffer()):
            self.close()
        return data


def _response(status: int, body: Object | str) -> urllib3.HTTPResponse:
    text = body if isinstance(body, str) else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    return urllib3.HTTPResponse(_Body(text.encode()), headers=headers, status=status, preload_content=False)
