"""Keep streams running against a gateway, and compare each answer with an undisturbed answer.

Usage: ``streams_load.py HOST:PORT STREAMS``. The program needs only the standard library, so it can run in any pod. The
program prints ``ready`` when it knows the undisturbed answers. Then it keeps STREAMS streams running until its standard
input ends. At the end it prints a JSON object: ``answers`` is the number of complete and correct answers, and
``failures`` describes every other answer.
"""

import http.client
import itertools
import json
import sys
import threading
from typing import Any

TIMEOUT_SECONDS = 120
QUESTIONS = [
    {"messages": [{"role": "user", "content": "Tell me a story about the town."}], "temperature": 0},
    {"messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 1, "seed": 7},
    {"messages": [{"role": "user", "content": "What is 1234 * 5678?"}], "temperature": 0},
    {"messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0, "logprobs": True},
]


def ask(address: str, question: dict[str, Any]) -> str:
    """Stream one answer. Returns its text and tool calls. Raises ValueError if the stream breaks or has an error."""
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_SECONDS)
    try:
        body = json.dumps({**question, "stream": True})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise ValueError(f"status {response.status}: {response.read().decode()[:300]}")
        said: list[str] = []
        for line in response:
            data = line.decode().removeprefix("data: ").strip()
            if data == "[DONE]":
                return "".join(said)
            event = json.loads(data) if data.startswith("{") else {}
            if "error" in event:
                raise ValueError(f"error event {event['error']}")
            for choice in event.get("choices", ()):
                delta = choice["delta"]
                said.append(delta.get("content") or "")
                for tool_event in delta.get("nanochat", {}).get("tool_events", ()):
                    tool_event.pop("duration_seconds", None)  # differs in each run
                    said.append(json.dumps(tool_event))
        raise ValueError(f"the stream ended after {''.join(said)!r}")
    finally:
        connection.close()


class Load:
    """Streams that are running, and the outcomes of the streams that have ended."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._expected = [ask(address, question) for question in QUESTIONS]
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self.ended = threading.Event()
        self.answers = 0
        self.failures: list[str] = []

    def run(self) -> None:
        """Ask one question after another until ``ended`` is set."""
        while not self.ended.is_set():
            number = next(self._numbers) % len(QUESTIONS)
            try:
                answer = ask(self._address, QUESTIONS[number])
                failure = None if answer == self._expected[number] else f"{answer!r} is not {self._expected[number]!r}"
            except (ValueError, OSError, http.client.HTTPException) as error:
                failure = repr(error)
            with self._lock:
                if failure is None:
                    self.answers += 1
                else:
                    self.failures.append(failure)


def main() -> None:
    address, streams = sys.argv[1], int(sys.argv[2])
    load = Load(address)
    print("ready", flush=True)
    threads = [threading.Thread(target=load.run) for _ in range(streams)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    load.ended.set()
    for thread in threads:
        thread.join()
    print(json.dumps({"answers": load.answers, "failures": load.failures}))


if __name__ == "__main__":
    main()
