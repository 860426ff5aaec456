"""Measure a newcomer's first quarter of an hour: seconds to the page, to a right answer, and to the promoted model.

Run the program from the project's root: ``python -m tests.benchmarks.first_quarter --runs 3``. Each run starts ``make
run``'s program with an empty store and an empty cache of compiled code, asks each snapshot the questions of
:data:`QUESTIONS` greedily, and ends when the promoted model answers. The table also has the seconds of each stage.
``--until page`` ends a run at an earlier event of :data:`EVENTS`, to try the program.
"""

import argparse
import json
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from jobs.demo_world.evaluation import evaluation_set
from tests.support.stack import Stack

EVENTS = ("page", "first step", "first snapshot", "right answers", "promoted")
# The examples of the chat page that have one right answer: the message, and what the answer must contain.
QUESTIONS = {
    "Who keeps the lighthouse?": "Mara",
    "What is 1234 * 5678?": "7006652",
    "How many letters r are in strawberry?": "3",
}
# A snapshot counts as answering right only if it also answers this many held-out items of each of these kinds, with at
# most MOST_WRONG wrong answers to all of them together.
KINDS, ITEMS_OF_A_KIND, MOST_WRONG = ("fact", "arithmetic"), 10, 1
LONGEST_SECONDS = 1800.0


def get(url: str) -> Any:
    """The JSON of a GET; None if the server does not answer with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return json.load(reply)
    except (OSError, ValueError):
        return None


def ask(url: str, messages: list[dict[str, Any]]) -> str:
    """The greedy answer to a conversation; empty if the server refuses or does not answer within a minute."""
    body = json.dumps({"model": "", "messages": messages, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, headers={"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return str(json.load(reply)["choices"][0]["message"]["content"])
    except OSError:
        return ""


def answers_right(url: str) -> bool:
    """Whether the model that serves now answers the questions and the held-out items right."""
    if not all(right in ask(url, [{"role": "user", "content": text}]) for text, right in QUESTIONS.items()):
        return False
    wrong = 0
    for kind in KINDS:
        for item in [item for item in evaluation_set(200, seed=7) if item.kind == kind][:ITEMS_OF_A_KIND]:
            answer = ask(url, list(item.messages))
            wrong += not any(phrase in answer for phrase in item.expected)
    return wrong <= MOST_WRONG


def run(home: Path, until: str) -> dict[str, float]:
    """Seconds from the start to each event up to ``until``, and the duration of each stage if the run is complete."""
    cache = home / "compiled"
    started = time.monotonic()
    stack = Stack(home / "store", TORCHINDUCTOR_CACHE_DIR=str(cache))
    events: dict[str, float] = {}
    tried = ""
    try:
        while until not in events:
            seconds = time.monotonic() - started
            assert seconds < LONGEST_SECONDS, "".join(stack.log)
            time.sleep(0.2)
            addresses = [line.split()[-1] for line in stack.log if line.startswith("Watch the model learn")]
            if not addresses:
                continue
            url = addresses[0]
            events.setdefault("page", seconds)
            progress = get(f"{url}/progress")
            if progress is None:
                continue
            if any(stage["curve"] for stage in progress["stages"].values()):
                events.setdefault("first step", seconds)
            served = progress["served"]
            if served:
                events.setdefault("first snapshot", seconds)
            if served and served != tried and "right answers" not in events:
                tried = served
                if answers_right(url):
                    events["right answers"] = time.monotonic() - started
            if served and served == progress["promoted"]:
                events["promoted"] = time.monotonic() - started
                events |= {f"stage {name}": value for name, value in progress["run"]["seconds"].items()}
    finally:
        assert stack.stop() == 0, "".join(stack.log)
    return events


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--until", choices=EVENTS, default="promoted")
    options = parser.parse_args()
    runs = []
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run(Path(folder), options.until))
        print({name: round(seconds, 1) for name, seconds in runs[-1].items()}, flush=True)
    print(f"{'':20}" + "".join(f"{f'run {i + 1}':>10}" for i in range(len(runs))) + f"{'median':>10}")
    for name in dict.fromkeys(name for events in runs for name in events):
        seconds = [events[name] for events in runs if name in events]
        row = "".join(f"{events[name]:>8.1f} s" if name in events else f"{'—':>10}" for events in runs)
        print(f"{name:20}{row}{statistics.median(seconds):>8.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
