"""Calls the Kubernetes API for programs in a cluster. A call is repeated while the API server does not answer."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import urllib3
from kubernetes import config, watch
from kubernetes.client import ApiClient, ApiException, CoreV1Api, CustomObjectsApi

from jobs.train.cluster.manifest import Object
from nanochat_core.errors import RetryableError, UserError

log = logging.getLogger(__name__)

# If the API server has not answered for this long, the pipeline ends, and the pipeline's Job starts it again.
PATIENCE_SECONDS = 600.0
_REQUEST_SECONDS = 30.0
_LONGEST_DELAY = 30.0
# Status codes of failures that may be temporary: the server cannot be reached (0), is starting or is overloaded, the
# token is being replaced, or another writer was faster.
_TRANSIENT = {0, 401, 408, 409, 429, 500, 502, 503, 504}
_NOT_FOUND, _CONFLICT, _GONE = 404, 409, 410
_MERGE = "application/merge-patch+json"


class Api:
    """One namespace of a cluster. Objects are JSON objects with all fields, also those unknown to the client library.

    Every call except :meth:`wait_for_change` raises UserError if the server refuses it, and RetryableError if the
    server has not answered for ``patience`` seconds.
    """

    def __init__(
        self,
        client: ApiClient,
        namespace: str,
        *,
        patience: float = PATIENCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            patience: seconds for which a call is repeated while the server does not answer; 0 tries each call once.
        """
        # The type is Any, because the library's own types do not describe objects in the form of JSON.
        self._objects: Any = CustomObjectsApi(client)
        self._core: Any = CoreV1Api(client)
        self._jobs = ("batch", "v1", namespace, "jobs")
        self._pytorch_jobs = ("kubeflow.org", "v1", namespace, "pytorchjobs")
        self._namespace, self._patience, self._clock, self._sleep = namespace, patience, clock, sleep

    def job(self, name: str) -> Object:
        """The Job with the given name."""
        found: Object = self._call(f"read Job {name}", self._objects.get_namespaced_custom_object, *self._jobs, name)
        return found

    def annotate_job(self, name: str, annotations: Mapping[str, str]) -> None:
        """Set annotations of a Job, unless it is gone."""
        self._patch(self._jobs, name, {"metadata": {"annotations": dict(annotations)}})

    def pod_template(self, name: str) -> Object:
        """The PodTemplate with the given name."""
        return self._core_object(f"read PodTemplate {name}", self._core.read_namespaced_pod_template, name)

    def pods(self, selector: str) -> list[Object]:
        """The pods that the label selector ``selector`` selects."""
        found = self._core_object("list pods", self._core.list_namespaced_pod, label_selector=selector)
        return list(found["items"])

    def pytorch_jobs(self, selector: str) -> tuple[list[Object], str]:
        """The PyTorchJobs that the label selector ``selector`` selects, and the resource version of their list."""
        found = self._call(
            "list PyTorchJobs",
            self._objects.list_namespaced_custom_object,
            *self._pytorch_jobs,
            label_selector=selector,
        )
        return found["items"], found["metadata"]["resourceVersion"]

    def create_pytorch_job(self, job: Object) -> bool:
        """Create a PyTorchJob. The result is False if a PyTorchJob of the same name exists already."""
        what = f"create PyTorchJob {job['metadata']['name']}"
        return self._create(what, self._objects.create_namespaced_custom_object, *self._pytorch_jobs, job)

    def patch_pytorch_job(self, name: str, patch: Object) -> None:
        """Change fields of a PyTorchJob, unless it is gone."""
        self._patch(self._pytorch_jobs, name, patch)

    def delete_pytorch_job(self, name: str, uid: str) -> None:
        """Delete a PyTorchJob and its pods, unless the PyTorchJob is gone or another PyTorchJob has its name now."""
        which = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}

        def attempt(*arguments: Any, **options: Any) -> None:
            try:
                self._objects.delete_namespaced_custom_object(*arguments, body=which, **options)
            except ApiException as error:
                if error.status not in (_NOT_FOUND, _CONFLICT):
                    raise

        self._call(f"delete PyTorchJob {name}", attempt, *self._pytorch_jobs, name)

    def create_event(self, event: Object) -> None:
        """Write an Event unless it exists already."""
        self._create("create an Event", self._core.create_namespaced_event, self._namespace, event)

    def wait_for_change(self, selector: str, version: str, seconds: float) -> None:
        """Wait up to ``seconds`` until a PyTorchJob that ``selector`` selects has changed since ``version``.

        ``version`` is the resource version of a list of PyTorchJobs, as :meth:`pytorch_jobs` returns it.

        The wait ends earlier if the connection breaks or the server has forgotten the version. Therefore the caller
        must list the PyTorchJobs again after every wait.
        """
        started = self._clock()
        try:
            for _event in watch.Watch().stream(  # type: ignore[no-untyped-call]
                self._objects.list_namespaced_custom_object,
                *self._pytorch_jobs,
                label_selector=selector,
                resource_version=version,
                timeout_seconds=max(1, int(seconds)),
                _request_timeout=seconds + _REQUEST_SECONDS,
            ):
                return
            if self._clock() - started < 1:
                self._pause("it ended at once")
        except ApiException as error:
            if error.status != _GONE:
                self._pause(f"{error.status} {error.reason}")
        except urllib3.exceptions.HTTPError as error:
            self._pause(str(error))

    def _pause(self, problem: str) -> None:
        log.info("watch ended", extra={"problem": problem})
        self._sleep(1.0)

    def _core_object(self, what: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Object:
        """Call a function of the core API group (pods, PodTemplates). Returns the server's answer as a JSON object."""

        def answer(*arguments: Any, **options: Any) -> Object:
            response = call(*arguments, _preload_content=False, **options)
            body = response.data.decode()
            if response.status >= 400:
                error = ApiException(status=response.status, reason=response.reason)
                error.body = body
                raise error
            found: Object = json.loads(body)
            return found

        found: Object = self._call(what, answer, *arguments, namespace=self._namespace, **options)
        return found

    def _create(self, what: str, create: Callable[..., Any], *arguments: Any) -> bool:
        def attempt(*arguments: Any, **options: Any) -> bool:
            try:
                create(*arguments, **options)
            except ApiException as error:
                # This is no failure: an earlier attempt of this call, or another pipeline of the same Job, has created
                # the object.
                if error.status == _CONFLICT and "AlreadyExists" in str(error.body):
                    return False
                raise
            return True

        return bool(self._call(what, attempt, *arguments))

    def _patch(self, collection: tuple[str, ...], name: str, patch: Object) -> None:
        def attempt(*arguments: Any, **options: Any) -> None:
            try:
                self._objects.patch_namespaced_custom_object(*arguments, _content_type=_MERGE, **options)
            except ApiException as error:
                if error.status != _NOT_FOUND:
                    raise

        self._call(f"change {collection[-1]} {name}", attempt, *collection, name, patch)

    def _call(self, what: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The result of a call, which is repeated with growing delays while its failure may be temporary."""
        deadline, delay = self._clock() + self._patience, 1.0
        while True:
            try:
                return call(*arguments, _request_timeout=_REQUEST_SECONDS, **options)
            except ApiException as error:
                problem = f"{error.status} {_message(error)}"
                if error.status not in _TRANSIENT:
                    raise UserError(f"the API server refuses to {what}: {problem}") from error
            except urllib3.exceptions.HTTPError as error:
                problem = str(error)
            if self._clock() >= deadline:
                raise RetryableError(f"the API server does not {what}: {problem}")
            log.warning("the API server does not answer", extra={"call": what, "problem": problem, "again_in": delay})
            self._sleep(delay)
            delay = min(2 * delay, _LONGEST_DELAY)


def client_of_pod() -> ApiClient:
    """A client with the rights of this pod's service account.

    Raises UserError if this process does not run in a pod with a service account.
    """
    try:
        config.load_incluster_config()  # type: ignore[no-untyped-call]
    except config.ConfigException as error:
        raise UserError(f"only a pod of the cluster can create PyTorchJobs: {error}") from error
    return ApiClient()


def _message(error: ApiException) -> str:
    """The server's explanation of an error."""
    try:
        return str(json.loads(str(error.body))["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)
