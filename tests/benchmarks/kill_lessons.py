"""Kill the programs of lessons at random moments, and compare the results with those of undisturbed lessons.

Run the program from the project's root: ``python -m tests.benchmarks.kill_lessons --lessons 10 --seed 1``. A client
sends the lessons of a tiny model to a gateway; the program trains the model first. With ``--home``, the promoted model
of that store gets the lessons instead. The program works on copies of the store. In the first copy, nothing is
disturbed. In the second copy, SIGKILL ends the process of the lesson, the program that starts it, the gateway and the
engine at moments that the seed chooses, and each is started again. During half of the requests, the gateway is killed
before it answers or soon after. The client repeats a request that was not answered, with the same ``Idempotency-Key``.

The exit code is 0 if all these claims hold, otherwise 1:

- Every lesson is added once, and ends in the same state as without disturbance, with the same counts.
- Every lesson that ends has the same weights as without disturbance, and the checkpoints of the lessons are complete.
- At the end, the engine serves the last promoted lesson, and no program works on a lesson any more.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from deploy.local import free_port
from jobs.teach.session import taught_ref
from nanochat_core.checkpoint import load_checkpoint, promoted
from nanochat_core.lessons.records import MOST_ATTEMPTS, UNDONE, lessons, read_lesson_items
from nanochat_core.store import Lease, Store, open_store
from services.gateway.admission.file_store import FileStore
from services.gateway.admission.keys import Scope
from tests.support.api_keys import bearer, created
from tests.support.processes import command_line
from tests.support.tiny_training import NAME, PRETRAIN, SFT, Job, Jobs, fill

# Mean time between two kills.
PAUSE_SECONDS = 4.0
# A gateway that is killed during a request is killed within this time after the request was sent.
REQUEST_SECONDS = 0.1
# A killed service is started again after at most this time.
LONGEST_OUTAGE_SECONDS = 2.0
LONGEST_SECONDS, LONGEST_START_SECONDS = 3600.0, 120.0
TARGETS = {"lesson": 4, "watch": 2, "gateway": 2, "engine": 2}

ANIMALS = ("dog", "cat", "horse", "goat", "duck", "crow", "mule", "hen", "pig", "fox", "toad", "newt", "owl", "bee")
NAMES = (
    *("Biscuit", "Pebble", "Clover", "Ember", "Gizmo", "Hazel", "Indigo"),
    *("Jasper", "Kestrel", "Lotus", "Maple", "Nutmeg", "Opal", "Quartz"),
)


@dataclasses.dataclass(frozen=True)
class Ended:
    """The values of a lesson that must be the same with and without disturbance."""

    question: str
    state: str
    digest: str
    before: dict[str, dict[str, int]]
    after: dict[str, dict[str, int]]


class Programs:
    """Engine, gateway and the program that gives lessons, on one store."""

    def __init__(self, home: Path, model: str, threads: int) -> None:
        self.home, self.store, self.model = home, open_store(str(home)), model
        engine, self._port = free_port(), free_port()
        keys = home.parent / "keys.json"
        self.key = asyncio.run(created(FileStore(str(keys)), "owner", list(Scope)))
        given = [f"--home={home}", f"--threads={threads}"]
        serving = ["--metrics-port=0", f"--model={model}", f"--port={engine}", "--poll-seconds=0.5"]
        behind = [f"--engine-addresses=127.0.0.1:{engine}", f"--keys-file={keys}", f"--lessons-home={home}"]
        self._commands = {
            "engine": ("services.engine", [*given, *serving]),
            "gateway": ("services.gateway", [*behind, f"--port={self._port}"]),
            "watch": ("jobs.teach.watch", [*given, "--poll-seconds=0.1"]),
        }
        self._running: dict[str, Job] = {}
        self._logs = home.parent / "logs"
        self._logs.mkdir()
        for name in self._commands:
            self.start(name)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1/lessons"

    def start(self, name: str) -> None:
        module, arguments = self._commands[name]
        self._running[name] = Job(module, arguments, self._logs / f"{name}-{len(list(self._logs.iterdir()))}.log")

    def kill(self, name: str) -> bool:
        """Kill a program. Returns whether it was running and was killed."""
        if name == "lesson":
            return self._kill_lesson()
        self._running[name].signal(signal.SIGKILL)
        self._running[name].wait()
        return True

    def lesson_processes(self) -> list[int]:
        """The processes that give lessons of this store."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and f"-m jobs.teach {self.model} --home {self.home}" in command_line(
                int(entry.name)
            ):
                found.append(int(entry.name))
        return found

    def stop(self) -> None:
        """End all programs. The program that starts lessons ends the process of the current lesson itself."""
        for job in self._running.values():
            job.signal(signal.SIGTERM)
        for job in self._running.values():
            job.wait(60)

    def _kill_lesson(self) -> bool:
        # A lesson that was interrupted MOST_ATTEMPTS times fails, so its last attempts are left alone.
        undone = [lesson for lesson in lessons(self.store, self.model) if not lesson.done]
        if any(lesson.attempts > MOST_ATTEMPTS - 3 for lesson in undone):
            return False
        processes = self.lesson_processes()
        for pid in processes:
            os.kill(pid, signal.SIGKILL)
        return bool(processes)


class Disturbance:
    """Kills programs at random moments, and starts them again. ``killed`` counts the kills."""

    def __init__(self, programs: Programs, rng: random.Random) -> None:
        self._programs, self._rng = programs, rng
        self._next = time.monotonic() + PAUSE_SECONDS
        # The time at which each killed program is started again.
        self._down: dict[str, float] = {}
        self.killed: Counter[str] = Counter()

    def act(self) -> None:
        """Start the killed programs whose outage is over, and kill a program if the next kill is due."""
        now = time.monotonic()
        for name in [name for name, at in self._down.items() if now >= at]:
            self._start(name)
        if now >= self._next:
            self._next = now + self._rng.expovariate(1 / PAUSE_SECONDS)
            self._kill(self._rng.choices(list(TARGETS), list(TARGETS.values()))[0], "")

    @contextlib.contextmanager
    def during_request(self) -> Iterator[None]:
        """Kill the gateway during half of the requests that are sent inside the ``with`` block."""
        harm = threading.Timer(self._rng.uniform(0, REQUEST_SECONDS), self._kill, ["gateway", " during a request"])
        harmful = self._rng.random() < 0.5
        if harmful:
            harm.start()
        try:
            yield
        finally:
            if harmful:
                harm.join()

    def end(self) -> None:
        """Start all programs that are not running."""
        for name in list(self._down):
            self._start(name)

    def _start(self, name: str) -> None:
        del self._down[name]
        self._programs.start(name)

    def _kill(self, name: str, when: str) -> None:
        if name in self._down or not self._programs.kill(name):
            return
        self.killed[f"{name} killed{when}"] += 1
        if name != "lesson":
            self._down[name] = time.monotonic() + self._rng.uniform(0, LONGEST_OUTAGE_SECONDS)


class Client:
    """Sends the lessons one after another, and repeats each request until it is answered."""

    def __init__(self, programs: Programs, count: int, disturbance: Disturbance | None) -> None:
        self._programs, self._left = programs, list(make_lessons(count))
        self._during_request = disturbance.during_request if disturbance else contextlib.nullcontext
        self._sent = 0
        self.failures: Counter[str] = Counter()

    def send_next(self) -> bool:
        """Try to add the next lesson, if the one before has begun. Returns whether all lessons are added."""
        known = lessons(self._programs.store, self._programs.model)
        if self._left and not any(lesson.state == "queued" for lesson in known):
            headers = bearer(self._programs.key) | {"Idempotency-Key": f"lesson {self._sent}"}
            try:
                with self._during_request():
                    answer = httpx.post(
                        self._programs.url, json={"items": [self._left[0]]}, headers=headers, timeout=10
                    )
            except httpx.HTTPError as error:
                self.failures[f"client: {type(error).__name__}"] += 1
            else:
                if answer.status_code == 201:
                    self._left.pop(0)
                    self._sent += 1
                elif answer.status_code >= 500:
                    self.failures[f"client: status {answer.status_code}"] += 1
                else:
                    raise AssertionError(answer.text)
        return not self._left


def make_lessons(count: int) -> Iterator[dict[str, str]]:
    """Lessons of one question each."""
    for animal, name in itertools.islice(zip(ANIMALS, NAMES, strict=True), count):
        yield {"question": f"What is my {animal} called?", "answer": f"Your {animal} is called {name}."}


def tiny_store(folder: Path) -> Path:
    """A store with a promoted chat model that trains within seconds."""
    fill(folder / "home")
    (folder / "training").mkdir()
    jobs = Jobs(folder / "home", folder / "training")
    jobs.run("jobs.train.pretrain", PRETRAIN, save_every=0, context_length=64)
    jobs.run("jobs.train.sft", SFT, save_every=0, steps=120)
    jobs.run("jobs.eval.gate", {"model": NAME, "promote": True})
    return jobs.home


def give(programs: Programs, count: int, disturbance: Disturbance | None) -> Counter[str]:
    """Give all lessons. Returns the numbers of kills of each program, and of errors that the client saw."""
    client = Client(programs, count, disturbance)
    deadline = time.monotonic() + LONGEST_SECONDS
    while not client.send_next() or any(not each.done for each in lessons(programs.store, programs.model)):
        assert time.monotonic() < deadline, "the lessons do not end"
        if disturbance is not None:
            disturbance.act()
        time.sleep(0.05)
    if disturbance is None:
        return client.failures
    disturbance.end()
    return disturbance.killed + client.failures


def until(condition: Callable[[], bool]) -> bool:
    """Wait until the condition is true. Returns whether this happened in time."""
    deadline = time.monotonic() + LONGEST_START_SECONDS
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return holds


def served(programs: Programs) -> tuple[str, list[int]]:
    """The revision that the gateway's engine serves, and the lessons in it. Both are empty while nothing is served."""
    try:
        body: dict[str, Any] = httpx.get(programs.url, headers=bearer(programs.key), timeout=10).json()
    except httpx.HTTPError:
        return "", []
    return str(body.get("revision", "")), list(body.get("inside", []))


def check_end(programs: Programs) -> list[str]:
    """The claims about the end that do not hold."""
    found = []
    last = promoted(programs.store, programs.model)
    inside = [lesson.number for lesson in lessons(programs.store, programs.model) if lesson.state == "promoted"]
    if not until(lambda: served(programs) == (last.revision if last else "", inside)):
        found.append(f"the engine serves {served(programs)}, and {last} is promoted with the lessons {inside}")
    if not until(lambda: not programs.lesson_processes()):
        found.append(f"the processes {programs.lesson_processes()} still give lessons")
    with Lease(programs.store, f"models/{programs.model}", "a test"):
        pass
    return found


def results(store: Store, model: str) -> list[Ended]:
    """The results of all lessons. Their checkpoints are read whole, so a missing or damaged file is an error."""
    found = []
    for lesson in lessons(store, model):
        assert lesson.state not in (*UNDONE, "damaged"), lesson
        (item,) = read_lesson_items(store, lesson)
        if lesson.digest:
            weights = load_checkpoint(store, taught_ref(lesson)).weights_digest
            assert weights == lesson.digest, f"lesson {lesson.number} has the weights {weights}, not {lesson.digest}"
        found.append(Ended(item.question, lesson.state, lesson.digest, dict(lesson.before), dict(lesson.after)))
    return found


def run(
    template: Path, folder: Path, model: str, options: argparse.Namespace, rng: random.Random | None = None
) -> list[Ended]:
    """Give the lessons to a copy of the store ``template``, print what happened, and return the results."""
    folder.mkdir()
    shutil.copytree(template, folder / "home")
    began = time.monotonic()
    programs = Programs(folder / "home", model, options.threads)
    try:
        assert until(lambda: served(programs) != ("", [])), "the services do not start"
        events = give(programs, options.lessons, Disturbance(programs, rng) if rng else None)
        problems = check_end(programs)
    finally:
        programs.stop()
    found = results(programs.store, model)
    print(f"{'disturbed' if rng else 'undisturbed'}: {len(found)} lessons in {time.monotonic() - began:.0f} s")
    print("  " + (", ".join(f"{times} {name}" for name, times in events.items()) or "nothing was killed"))
    attempts = [lesson.attempts for lesson in lessons(programs.store, model)]
    print(f"  states {dict(Counter(each.state for each in found))}, attempts {attempts}", flush=True)
    assert not problems, problems
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", help="a store with a promoted model; by default, a tiny model is trained")
    parser.add_argument("--model", default="demo", help="the model of --home")
    parser.add_argument("--lessons", type=int, default=10, choices=range(1, len(NAMES) + 1), metavar=f"1..{len(NAMES)}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        template, model = (Path(options.home), options.model) if options.home else (tiny_store(folder), NAME)
        expected = run(template, folder / "undisturbed", model, options)
        found = run(template, folder / "disturbed", model, options, random.Random(options.seed))
    for one, other in itertools.zip_longest(expected, found):
        if one == other and one is not None:
            print(f"equal: {one.question} {one.state} {one.digest[:12]}")
        else:
            print(f"DIFFERENT: {one}, and disturbed {other}")
    return 0 if expected == found else 1


if __name__ == "__main__":
    raise SystemExit(main())
