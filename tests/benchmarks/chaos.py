"""Kill, stop and start all services in random order under load, and count what the clients see.

Run the program from the project's root: ``make chaos``, or ``python -m tests.benchmarks.chaos --minutes 10 --seed 1``.
Two gateways, three engines and two sandboxes run as processes of this machine, with a small random model. The official
OpenAI client sends streamed and whole requests: greedy and seeded ones, several choices, log probabilities, JSON
schemas, stop strings and Python calls. Meanwhile processes are killed (SIGKILL), hang and go on (SIGSTOP, SIGCONT), end
in an orderly way (SIGTERM) and start again. The seed decides the order. At least one process of each kind is always
left running.

The exit code is 0 if both claims hold, otherwise 1:

- Every answer is the same as without disturbance: nothing is missing, and nothing comes twice.
- Every client error is one of ``DOCUMENTED``.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.support.chaos_stack import ChaosStack, Instance, State, chaos_stack
from tests.support.engine_models import CALLING

CLIENTS = 6
# Mean time between two actions.
PAUSE_SECONDS = 2.0
# A process may be disturbed only if another process of the same kind has been ready for this long. The clients then
# know that other process.
SETTLE_SECONDS = 4.0
# A stopped process is continued after this time at the latest.
LONGEST_STOP_SECONDS = 8.0
REQUEST_SECONDS = 120.0
START_SECONDS = 180.0

ANSWERED = "answered"
DOCUMENTED = {
    "gateway killed": "the gateway that had the request was killed: the connection breaks",
    "gateway shutting down": "the gateway that got the request was ending: 503 shutting_down, or a refused connection",
}
"""The errors that a client may see, with their reason. docs/deployment.md describes them."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A request whose answer is always the same."""

    name: str
    body: dict[str, Any]
    stream: bool


@dataclasses.dataclass
class Report:
    """Counts of outcomes and actions. ``failures`` describes each violated claim."""

    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    actions: Counter[str] = dataclasses.field(default_factory=Counter)
    variants: Counter[str] = dataclasses.field(default_factory=Counter)
    failures: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


def make_variants() -> list[Variant]:
    """Return every kind of request, both streamed and whole."""
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer"}}}
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0, "max_tokens": 300},
        "seeded": {"temperature": 1, "seed": 5, "max_tokens": 200},
        "two choices": {"temperature": 1, "seed": 6, "n": 2, "max_tokens": 150},
        "log probabilities": {"temperature": 0, "logprobs": True, "top_logprobs": 2, "max_tokens": 100},
        "penalties": {
            "temperature": 1,
            "seed": 7,
            "frequency_penalty": 0.5,
            "presence_penalty": 0.5,
            "max_tokens": 200,
        },
        "stop strings": {"temperature": 1, "seed": 8, "stop": ["zzz", "qq"], "max_tokens": 300},
        "schema": {
            "temperature": 1,
            "seed": 9,
            "max_tokens": 100,
            "response_format": {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}},
        },
        "Python calls": {
            "temperature": 0,
            "max_tokens": 200,
            "logit_bias": {str(token): bias for token, bias in CALLING.items()},
        },
    }
    variants = []
    for name, body in kinds.items():
        request = {"model": "tiny", "messages": [{"role": "user", "content": f"Tell me of {name}."}], **body}
        variants += [Variant(name, request, stream) for stream in (True, False)]
    return variants


async def ask(client: openai.AsyncOpenAI, variant: Variant) -> list[Any]:
    """Return the answer's choices for comparison: text, tool events, log probabilities and finish reason."""
    choices: dict[int, dict[str, Any]] = {}

    def add(part: Any, message: Any) -> None:
        choice = choices.setdefault(part.index, {"text": "", "events": [], "tokens": [], "ends": []})
        choice["text"] += message.content or ""
        for event in (getattr(message, "nanochat", None) or {}).get("tool_events", ()):
            choice["events"].append({key: value for key, value in event.items() if key != "duration_seconds"})
        if part.logprobs is not None:
            choice["tokens"] += [(token.token, token.logprob) for token in part.logprobs.content or ()]
        choice["ends"] += [part.finish_reason] if part.finish_reason else []

    if variant.stream:
        async with await client.chat.completions.create(**variant.body, stream=True) as stream:
            async for chunk in stream:
                for part in chunk.choices:
                    add(part, part.delta)
    else:
        for part in (await client.chat.completions.create(**variant.body)).choices:
            add(part, part.message)
    if any(len(choice["ends"]) != 1 for choice in choices.values()):
        raise Incomplete(f"a stream ended with the reasons {[choice['ends'] for choice in choices.values()]}")
    return [choices[index] for index in sorted(choices)]


class Incomplete(Exception):
    """A stream ended without an error before every choice had ended."""


class Load:
    """Clients that send requests until :attr:`stopping` is set, and compare each answer with the undisturbed answer."""

    def __init__(self, stack: ChaosStack, report: Report, seed: int) -> None:
        self.stopping = asyncio.Event()
        self._stack, self._report = stack, report
        self._rng = random.Random(seed)
        self._variants = make_variants()
        self._expected: dict[str, list[Any]] = {}
        self._clients = {
            gateway: openai.AsyncOpenAI(
                base_url=f"http://{gateway.address}/v1",
                api_key="unused",
                max_retries=0,
                timeout=REQUEST_SECONDS,
                http_client=httpx.AsyncClient(verify=False),
            )
            for gateway in stack.gateways
        }

    async def learn(self) -> None:
        """Send every request once without disturbance, and store the answers."""
        client = self._clients[self._stack.gateways[0]]
        for variant in self._variants:
            answer = await ask(client, variant)
            if self._expected.setdefault(variant.name, answer) != answer:
                raise AssertionError(f"{variant.name}: a stream differs from a whole answer even without disturbance")

    async def run(self) -> None:
        """Send requests, each to a gateway that is not known to be down, as a load balancer does."""
        while not self.stopping.is_set():
            # A stopped gateway counts as up, unless it was stopped before it could listen.
            up = [
                gateway
                for gateway in self._stack.gateways
                if gateway.ready_since is not None or (gateway.state is State.STOPPED and gateway.served)
            ]
            if not up:
                await asyncio.sleep(0.05)
                continue
            await self._send(self._rng.choice(up), self._rng.choice(self._variants))

    async def _send(self, gateway: Instance, variant: Variant) -> None:
        began = time.monotonic()
        self._report.variants[variant.name] += 1
        try:
            answer = await ask(self._clients[gateway], variant)
        except (openai.OpenAIError, httpx.HTTPError, Incomplete) as error:
            outcome = outcome_of(error, {harm.action for harm in gateway.harms if harm.at >= began})
            if outcome not in DOCUMENTED:
                self._fail(variant, gateway, f"{outcome}: {error!r}", began)
        else:
            outcome = ANSWERED
            if answer != self._expected[variant.name]:
                outcome = "wrong answer"
                self._fail(variant, gateway, difference(self._expected[variant.name], answer), began)
        self._report.outcomes[outcome] += 1

    def _fail(self, variant: Variant, gateway: Instance, what: str, began: float) -> None:
        kind = "stream" if variant.stream else "whole answer"
        recent = [
            f"{instance.name} {harm.action} {time.monotonic() - harm.at:.1f} s ago"
            for instance in self._stack.instances
            for harm in instance.harms
            if harm.at >= began - SETTLE_SECONDS
        ]
        self._report.failures.append(f"{variant.name}, {kind}, {gateway.name}: {what} ({'; '.join(recent)})")


def outcome_of(error: Exception, harms: Iterable[str]) -> str:
    """Name the error of a client's request.

    ``harms`` has the actions on the client's gateway during the request.
    """
    if isinstance(error, openai.APITimeoutError):
        return "timeout"
    broken = isinstance(error, openai.APIConnectionError | httpx.HTTPError)
    if broken and "kill" in harms:
        return "gateway killed"
    body = error.body if isinstance(error, openai.APIError) and isinstance(error.body, dict) else {}
    code = str(body.get("code") or "")
    refused = isinstance(error, openai.APIConnectionError)  # this error occurs only before the answer begins
    if "end" in harms and (code == "shutting_down" or refused):
        return "gateway shutting down"
    if isinstance(error, openai.APIStatusError):
        return f"status {error.status_code} {code}".rstrip()
    return f"error event {code}".rstrip() if body else type(error).__name__


def difference(expected: list[Any], got: list[Any]) -> str:
    """Describe the first difference between two answers."""
    for index, (one, other) in enumerate(zip(expected, got, strict=False)):
        for field in one:
            if one[field] != other[field]:
                at = next((i for i, (a, b) in enumerate(zip(one[field], other[field], strict=False)) if a != b), None)
                at = min(len(one[field]), len(other[field])) if at is None else at
                pair = (json.dumps(text[field][at : at + 20]) for text in (one, other))
                return f"choice {index}, {field} at {at} of {len(one[field])}: expected {next(pair)}, got {next(pair)}"
    return f"{len(got)} choices in place of {len(expected)}"


async def disturb(stack: ChaosStack, report: Report, rng: random.Random, seconds: float, least: int) -> None:
    """Kill, stop, continue, end or start random processes for ``seconds``, or longer if ``least`` actions need it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end or report.actions.total() < least:
        await asyncio.sleep(rng.expovariate(1 / PAUSE_SECONDS))
        for instance in stack.instances:
            if instance.state is State.STOPPED and time.monotonic() - instance.harms[-1].at > LONGEST_STOP_SECONDS:
                instance.resume()
        # The list of processes is always the same, so the order depends on the seed as far as real processes allow.
        instance = rng.choice(stack.instances)
        spare = any(other.settled(SETTLE_SECONDS) for other in stack.others(instance))
        choices = {
            State.DEAD: ["start"],
            State.STOPPED: ["resume", "kill"],
            State.STARTED: ["kill", "stop", "end"] if spare else [],
            State.ENDING: [],
        }[instance.state]
        if not choices:
            continue
        action = rng.choice(choices)
        await asyncio.to_thread(getattr(instance, action))
        report.actions[f"{instance.kind} {action}"] += 1
        print(f"{time.strftime('%H:%M:%S')}  {instance.name}: {action}", flush=True)


async def run_chaos(minutes: float, seed: int, clients: int = CLIENTS, least: int = 0) -> Report:
    """Start all services, record the undisturbed answers, and disturb the services for ``minutes``.

    On a busy machine, ``least`` actions may take longer. At the end, repair the services and let the last requests
    finish.
    """
    report = Report()
    with tempfile.TemporaryDirectory() as home:
        async with chaos_stack(Path(home)) as stack:
            await stack.heal(START_SECONDS)
            load = Load(stack, report, seed)
            await load.learn()
            began = time.monotonic()
            running = [asyncio.create_task(load.run()) for _ in range(clients)]
            await disturb(stack, report, random.Random(seed), 60 * minutes, least)
            try:
                await stack.heal(START_SECONDS)
            except TimeoutError as error:
                report.failures.append(str(error))
            await asyncio.sleep(SETTLE_SECONDS)
            load.stopping.set()
            await asyncio.gather(*running)
            report.seconds = time.monotonic() - began
    if not report.outcomes[ANSWERED]:
        report.failures.append("no request was answered")
    return report


def print_report(report: Report) -> None:
    """Print the outcomes, the actions and the failures."""
    requests = report.outcomes.total()
    print(f"\n{requests} requests in {report.seconds:.0f} s: " + counted(report.variants))
    print(f"{report.actions.total()} actions: " + counted(report.actions))
    for outcome, count in report.outcomes.most_common():
        kind = "" if outcome == ANSWERED else DOCUMENTED.get(outcome, "NOT DOCUMENTED")
        print(f"{count:8} {outcome}{f'  ({kind})' if kind else ''}")
    for failure in report.failures[:20]:
        print(f"FAILED: {failure}")
    print("every claim holds" if not report.failures else f"{len(report.failures)} failures")


def counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # exit normally, so that the services end too
    report = asyncio.run(run_chaos(options.minutes, options.seed, options.clients))
    print_report(report)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
