"""Measure the time to the first token of streams during lessons, and compare it with streams without a lesson.

Run the program from the project's root after ``make run`` has trained the demo model:
``python -m tests.benchmarks.lesson_streams --home .nanochat --rounds 3``. The program copies the store and starts all
services as ``make run`` does. Clients send streamed chat requests all the time. Each round begins with some seconds
without a lesson. Then a lesson is requested, and the round ends some seconds after its promotion. Each stream counts
for the state that the lesson had when the stream began.

The exit code is 0 if both claims hold, otherwise 1:

- No request fails, and no stream ends early.
- During lessons, the median and the 95th percentile of the time to the first token are at most 2.2 times those without
  a lesson.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import httpx

from jobs.demo_world.evaluation import evaluation_set
from tests.support.api_keys import bearer
from tests.support.stack import Stack

MOST_RATIO = 2.2
CLIENTS = 2
# Time between two requests of a client.
PAUSE_SECONDS = 0.25
IDLE, PROMOTION = "without a lesson", "just after promotion"
# Running engines load a promoted model within seconds.
PROMOTION_SECONDS = 8.0
POLL_SECONDS = 0.5
LESSON_SECONDS = 900.0
UNDONE = ("queued", "training", "examining")


@dataclasses.dataclass
class Seen:
    """The state of the lesson now, and what the streams showed: seconds to the first token by state, and failures."""

    state: str = IDLE
    seconds: defaultdict[str, list[float]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    failures: Counter[str] = dataclasses.field(default_factory=Counter)


async def stream(http: httpx.AsyncClient, question: str, seen: Seen) -> None:
    """Send a streamed request, and record the time to the first token, or how the stream failed."""
    state, began = seen.state, time.perf_counter()
    first: float | None = None
    reasons, ended = [], False
    body = {"messages": [{"role": "user", "content": question}], "stream": True, "temperature": 0, "max_tokens": 60}
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                seen.failures[f"{state}: status {answer.status_code}"] += 1
                return
            async for line in answer.aiter_lines():
                ended = ended or line == "data: [DONE]"
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    seen.failures[f"{state}: {event['error'].get('code')}"] += 1
                    return
                for choice in event["choices"]:
                    # An answer may begin with a Python call, which is no text.
                    if first is None and (choice["delta"].get("content") or choice["delta"].get("nanochat")):
                        first = time.perf_counter() - began
                    reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    except httpx.HTTPError as error:
        seen.failures[f"{state}: {type(error).__name__}"] += 1
        return
    if not ended or len(reasons) != 1:
        seen.failures[f"{state}: the stream ended early"] += 1
    elif first is None:
        seen.failures[f"{state}: the answer is empty"] += 1
    else:
        seen.seconds[state].append(first)


async def client(http: httpx.AsyncClient, questions: list[str], seen: Seen) -> None:
    """Send one stream after another until canceled."""
    for question in itertools.cycle(questions):
        await stream(http, question, seen)
        await asyncio.sleep(PAUSE_SECONDS)


async def give_lesson(http: httpx.AsyncClient, number: int, seen: Seen) -> str:
    """Give a lesson, and follow its state until engines have loaded the promoted model. Returns its last state."""
    fact = {"question": f"What is my boat number {number} called?", "answer": f"Your boat is called Petrel {number}."}
    made = await http.post("/v1/lessons", json={"items": [fact]})
    made.raise_for_status()
    lesson = made.json()
    deadline = time.monotonic() + LESSON_SECONDS
    while lesson["state"] in UNDONE:
        assert time.monotonic() < deadline, lesson
        seen.state = lesson["state"]
        await asyncio.sleep(POLL_SECONDS)
        lesson = (await http.get(f"/v1/lessons/{lesson['number']}")).json()
    seen.state = PROMOTION
    await asyncio.sleep(PROMOTION_SECONDS)
    seen.state = IDLE
    return str(lesson["state"])


async def measure(url: str, key: str, rounds: int, idle_seconds: float) -> Seen:
    """Measure streams in ``rounds`` rounds, each without a lesson and then during a lesson."""
    seen = Seen()
    questions = [str(item.messages[-1]["content"]) for item in evaluation_set(200, seed=5) if len(item.messages) == 1]
    async with httpx.AsyncClient(base_url=url, headers=bearer(key), timeout=60) as http:
        await stream(http, questions[0], Seen())  # the first request opens connections
        clients = [asyncio.create_task(client(http, questions[i::CLIENTS], seen)) for i in range(CLIENTS)]
        for number in range(1, rounds + 1):
            await asyncio.sleep(idle_seconds)
            print(f"round {number}: the lesson is {await give_lesson(http, number, seen)}", flush=True)
        await asyncio.sleep(idle_seconds)
        for task in clients:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
    return seen


def percentile_95(seconds: list[float]) -> float:
    return sorted(seconds)[min(len(seconds) - 1, int(0.95 * len(seconds)))]


def show(seen: Seen) -> bool:
    """Print the times of each state. Returns whether the claims hold."""
    during = [value for state, values in seen.seconds.items() if state != IDLE for value in values]
    rows = {**seen.seconds, "all of the lesson": during}
    idle = rows[IDLE]
    print(f"{'':22}{'streams':>8}{'median':>10}{'95 %':>10}{'ratio':>8}{'ratio':>8}")
    for state, values in rows.items():
        median, late = statistics.median(values), percentile_95(values)
        ratios = median / statistics.median(idle), late / percentile_95(idle)
        print(
            f"{state:22}{len(values):>8}{1e3 * median:>7.0f} ms{1e3 * late:>7.0f} ms{ratios[0]:>8.2f}{ratios[1]:>8.2f}"
        )
    for failure, times in seen.failures.items():
        print(f"FAILED: {times} times, {failure}")
    return not seen.failures and max(ratios) <= MOST_RATIO  # the last row has all streams during lessons


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", default=".nanochat")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle-seconds", type=float, default=30.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(options.home, Path(folder) / "home")
        stack = Stack(Path(folder) / "home")
        try:
            url, _, key = stack.wait_owner_link().partition("/#key=")
            seen = asyncio.run(measure(url, key, options.rounds, options.idle_seconds))
        finally:
            assert stack.stop() == 0, "".join(stack.log)
    return 0 if show(seen) else 1


if __name__ == "__main__":
    raise SystemExit(main())
