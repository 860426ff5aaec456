"""Lessons as PyTorchJobs of a fake cluster, with a real store."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.teach import watch
from jobs.teach.lesson_jobs import MODEL, NUMBER, LessonJobs
from jobs.teach.session import end_canceled
from jobs.teach.watch import Watch, WatchSettings
from jobs.train.cluster.api import Api
from nanochat_core.lessons.items import Item
from nanochat_core.lessons.records import Lesson, Plan, State, add_lesson, cancel_lesson, read_lesson, write_lesson
from nanochat_core.store import Store
from tests.support.fake_cluster import NAMESPACE, FakeCluster, Killed, Object

# All rights that the chart gives the program in the cluster.
RULES: list[Object] = [
    {"apiGroups": ["kubeflow.org"], "resources": ["pytorchjobs"], "verbs": ["create", "delete", "list"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
]
ROLE: Object = {"kind": "Role", "metadata": {"name": "teacher"}, "rules": RULES}
TEMPLATE: Object = {
    "apiVersion": "v1",
    "kind": "PodTemplate",
    "metadata": {"name": "nanochat-lesson", "namespace": NAMESPACE, "labels": {"app": "nanochat"}},
    "template": {
        "metadata": {"labels": {"app": "nanochat"}},
        "spec": {"containers": [{"name": "pytorch", "image": "nanochat-jobs:dev"}]},
    },
}
# The state that a lesson gets if the fake cluster's script ends its program with these words.
STATES: dict[str, State] = {"end": "promoted", "exit 3": "refused", "exit 4": "failed", "exit 5": "canceled"}


class World:
    """A store, a fake cluster whose pods give lessons, and ``jobs.teach.watch``. It looks for lessons every second."""

    def __init__(
        self, store: Store, monkeypatch: pytest.MonkeyPatch, world: Iterable[str] = (), calls: Iterable[str] = ()
    ) -> None:
        self.store = store
        self.cluster = FakeCluster([ROLE], self.work, calls, world)
        self.template = copy.deepcopy(TEMPLATE)
        self.writes = True
        monkeypatch.setattr(watch.time, "monotonic", self.cluster.clock)
        self.start()

    def start(self) -> None:
        """Start ``jobs.teach.watch``. An earlier instance is dropped without a stop, as if it had been killed."""
        api = Api(self.cluster.client(), NAMESPACE, patience=0.0, clock=self.cluster.clock, sleep=self.cluster.sleep)
        self.jobs = LessonJobs(
            self.store,
            api,
            lambda: self.template,
            lambda lesson: self.watch.lesson_arguments(lesson),
            self.end_canceled,
            clock=self.cluster.clock,
            now=self.cluster.clock,
        )
        self.watch = Watch(WatchSettings(home=str(self.store)), self.jobs)

    def add(self, model: str = "demo") -> Lesson:
        items = [Item.of("What is my dog called?", "Rex.")]
        return add_lesson(self.store, model, items, Plan(), who="ada", source="own.md")

    def cancel(self, number: int = 1, model: str = "demo") -> None:
        cancel_lesson(self.store, model, number)

    def read(self, number: int = 1, model: str = "demo") -> Lesson:
        return read_lesson(self.store, model, number)

    def work(self, job: Object, how: str) -> None:
        """Write the result that the program in a pod writes before it ends. ``how`` is the way in which it ends."""
        annotations = job["metadata"]["annotations"]
        if self.writes and how in STATES:
            lesson = self.read(int(annotations[NUMBER]), annotations[MODEL])
            if not lesson.done:
                write_lesson(self.store, dataclasses.replace(lesson, state=STATES[how]))

    def end_canceled(self, lesson: Lesson) -> subprocess.Popen[bytes]:
        end_canceled(self.store, lesson.model, lesson.number)
        ended: Any = SimpleNamespace(poll=lambda: 0)
        return ended  # type: ignore[no-any-return]

    def look(self) -> None:
        """Let the program look once, and wait for the threads that it has started."""
        self.watch.look()
        for thread in self.jobs._settling.values():
            thread.join()

    def run(self, seconds: int) -> None:
        """Let time pass. A program that is killed starts again at once."""
        for _ in range(seconds):
            try:
                self.look()
            except Killed:
                self.start()
            self.cluster.sleep(1.0)
