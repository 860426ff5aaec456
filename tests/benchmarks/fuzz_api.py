"""Send generated requests to a gateway, and count answers of 5xx, hangs and errors in a wrong form.

Run the program from the project's root, against a running gateway such as that of ``make run``::

    uv run --no-project --with schemathesis python -m tests.benchmarks.fuzz_api http://localhost:8000 --requests 20000

schemathesis makes requests from ``/openapi.json``: valid ones, and a few that break the schema. Making a request that
breaks the schema takes schemathesis up to a second. Most broken requests are therefore made here: each valid body is
also sent twice with further fields of earlier bodies, broken in one place. One of the two asks a plain question. The
gateway refuses most other questions that schemathesis makes, because the schema cannot say, for example, which role
needs which content.

The requests come in turns. The seed of a turn decides what the turn sends, so ``--seed`` continues where an earlier run
ended. The exit code is 0 if every request was answered in time, with no status of 5xx, and with every error in the
API's form; otherwise 1.

The program is not part of ``make test``, because schemathesis is not among the locked dependencies.
"""

import argparse
import copy
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

# An answer that takes longer counts as a hang.
TIMEOUT_SECONDS = 60.0
REPORT_SECONDS = 10.0
ERROR_FIELDS = {"message", "type", "param", "code"}
# Numbers of requests to each operation in a turn: valid requests, and requests that schemathesis breaks.
VALID, BROKEN = 100, 5
# A plain question in the fields of all operations. Only the fields that a body has already are replaced.
PLAIN = {"messages": [{"role": "user", "content": "hello"}], "prompt": "hello", "input": "hello"}
# Values that replace a correct value: integers next to the limits of 32 and 64 bits, and values of every other type.
ODD: list[Any] = [
    *(sign * 2**bits + more for bits in (0, 31, 32, 63, 64) for sign in (-1, 1) for more in (-1, 0, 1)),
    *(10**400, 10.0, 0.5, -0.5, 1e308, float("inf"), float("nan"), True, False, None),
    *("", "5", "\0", "\ud800", "\U0001f600", "a" * 1000, "(", "null"),
    *([], {}, [[]], [None], [{}], {"": None}, {"type": "x"}, [0] * 300),
]


class Tally:
    """What the gateway has answered so far, and when to stop."""

    def __init__(self, requests: int, seconds: float) -> None:
        self.statuses: Counter[tuple[str, int]] = Counter()  # by operation and status
        self.failures: Counter[str] = Counter()
        self.slowest = 0.0  # longest time to an answer in seconds
        self._requests, self._seconds = requests, seconds
        self._began = self._reported = time.monotonic()

    @property
    def done(self) -> bool:
        """Whether there were enough requests, or the time is over."""
        return self.statuses.total() >= self._requests or time.monotonic() - self._began >= self._seconds

    def fail(self, failure: str, body: Any) -> None:
        """Counts a failure. The first one of its kind is printed with the request's body."""
        self.failures[failure] += 1
        if self.failures[failure] == 1:
            print(f"FAILED {failure}; body: {str(body)[:500]!a}", flush=True)

    def report(self, seed: int, *, now: bool = False) -> None:
        """Prints the counts if ``now`` is set or the last report is at least :data:`REPORT_SECONDS` old."""
        time_ = time.monotonic()
        if now or time_ - self._reported >= REPORT_SECONDS:
            self._reported = time_
            count, seconds = self.statuses.total(), time_ - self._began
            failures = self.failures.total()
            print(
                f"{count} requests in {seconds:.0f} s ({count / seconds:.0f}/s), {failures} failures, slowest answer "
                f"{self.slowest:.2f} s, seed {seed}",
                flush=True,
            )


class Client:
    """Sends requests and counts the answers."""

    def __init__(self, url: str, tally: Tally) -> None:
        import requests

        self.url = url
        self.tally = tally
        self._session = requests.Session()

    def ask(self, name: str, request: dict[str, Any]) -> None:
        """Sends a request to the operation of this name. The request is given as arguments of ``Session.request``."""
        import requests

        began = time.monotonic()
        try:
            answer = self._session.request(**request, timeout=TIMEOUT_SECONDS)
        except (requests.Timeout, requests.ConnectionError) as error:
            self.tally.fail(f"{name}: {type(error).__name__}", request.get("data"))
            return
        except (requests.RequestException, ValueError):
            return  # the client's library cannot send this request
        self.tally.slowest = max(self.tally.slowest, time.monotonic() - began)
        self.tally.statuses[name, answer.status_code] += 1
        if answer.status_code >= 500:
            self.tally.fail(f"{name}: {answer.status_code} {answer.text[:100]}", request.get("data"))
        elif answer.status_code >= 400 and not well_formed(answer.text):
            self.tally.fail(f"{name}: {answer.status_code} in a wrong form: {answer.text[:100]}", request.get("data"))


class Operation:
    """An operation of the API and its strategies, which are costly to make."""

    def __init__(self, operation: Any, client: Client) -> None:
        """``operation`` is schemathesis's description of the operation."""
        from schemathesis import GenerationMode

        self.name = f"{operation.method.upper()} {operation.path}"
        self._client = client
        counts = ((GenerationMode.POSITIVE, VALID), (GenerationMode.NEGATIVE, BROKEN))
        self._strategies = [(operation.as_strategy(generation_mode=mode), count) for mode, count in counts]

    def send_turn(self, seed: int) -> None:
        """Sends the requests of one turn. The seed decides which ones."""
        import hypothesis

        chance = random.Random(f"{seed} {self.name}")
        bodies: list[dict[str, Any]] = []
        given: Any = hypothesis.given
        for strategy, count in list(self._strategies):
            settings = hypothesis.settings(
                max_examples=count,
                deadline=None,
                database=None,
                phases=[hypothesis.Phase.generate],
                suppress_health_check=list(hypothesis.HealthCheck),
            )

            def send(case: Any) -> None:
                if not self._client.tally.done:
                    self._send(case, bodies, chance)
                    self._client.tally.report(seed)

            turn: Callable[[], None] = hypothesis.seed(seed)(settings(given(strategy)(send)))
            try:
                turn()
            except hypothesis.errors.Unsatisfiable:
                # An operation without parameters has nothing that a request could break.
                self._strategies.remove((strategy, count))

    def _send(self, case: Any, bodies: list[dict[str, Any]], chance: random.Random) -> None:
        request = case.as_transport_kwargs(base_url=self._client.url)
        if not isinstance(request.get("json"), dict):
            self._client.ask(self.name, request)
            return
        body = request.pop("json")
        self._client.ask(self.name, {**request, "data": short(body)})
        bodies.append(body)
        for plain in ({key: value for key, value in PLAIN.items() if key in body}, {}):
            whole = {**chance.choice(bodies), **body, **plain}
            self._client.ask(self.name, {**request, "data": short(broken(whole, chance))})


def main() -> int:
    """Sends the requests and prints the number of answers of each status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="address of the gateway, such as http://localhost:8000")
    parser.add_argument("--requests", type=int, default=20_000, help="number of requests in all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="longest time in all; no limit by default")
    parser.add_argument("--seed", type=int, default=1, help="seed of the first turn")
    parser.add_argument("--only", default="", help="word in the names of the operations to test; all by default")
    flags = parser.parse_args()

    import schemathesis

    tally = Tally(flags.requests, flags.seconds)
    client = Client(flags.url, tally)
    schema = schemathesis.openapi.from_url(f"{flags.url}/openapi.json")
    operations = [Operation(each.ok(), client) for each in schema.get_all_operations()]
    chosen = [operation for operation in operations if flags.only in operation.name]
    if not chosen:
        parser.error(f"no operation has {flags.only!r} in its name")
    seed = flags.seed
    while not tally.done:
        for operation in chosen:
            operation.send_turn(seed)
        seed += 1
    for (operation_name, status), count in sorted(tally.statuses.items()):
        print(f"{count:7d}  {status}  {operation_name}")
    tally.report(seed - 1, now=True)
    for failure, count in tally.failures.most_common(50):
        print(f"{count:7d}  {failure}")
    print(f"to continue: --seed {seed}")
    return 1 if tally.failures else 0


def short(body: Any) -> str:
    """The body as JSON. A body without ``max_tokens`` asks for one token, so that the answer takes little time."""
    return json.dumps({"max_tokens": 1, **body} if isinstance(body, dict) else body)


def broken(body: dict[str, Any], chance: random.Random) -> Any:
    """A copy of the body in which one value is missing, or is replaced by an odd value or by another place's value."""
    whole = {"body": copy.deepcopy(body)}
    places = list(places_in(whole))
    container, key = chance.choice(places)
    kind = chance.randrange(4)
    if kind == 0 and container is not whole:
        del container[key]
    elif kind == 1:
        other, name = chance.choice(places)
        container[key] = copy.deepcopy(other[name])
    else:
        container[key] = chance.choice(ODD)
    return whole["body"]


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """All places in a JSON value: an object or array, and a key or index of it."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places_in(value[key])


def well_formed(body: str) -> bool:
    """Whether an error has the API's form."""
    try:
        return set(json.loads(body)["error"]) == ERROR_FIELDS
    except (ValueError, KeyError, TypeError):
        return False


if __name__ == "__main__":
    sys.exit(main())
