"""The workload of a benchmark: the requests, and the load, which decides when the requests are sent.

A mix is a kind of requests: ``fixed`` (all of the same lengths), ``mixed`` (of random lengths), ``samples`` (with
several continuations of each prompt) or ``prefix`` (with prompts that begin with the same tokens).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

MIXES = ("fixed", "mixed", "samples", "prefix")


@dataclasses.dataclass(frozen=True)
class BenchRequest:
    """A prompt of token ids, and how to continue this prompt.

    The model writes ``n`` continuations of ``output_tokens`` tokens each. Temperature 0 means greedy decoding.
    """

    prompt: tuple[int, ...]
    output_tokens: int
    n: int = 1
    temperature: float = 0.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """Lengths of requests in tokens.

    Attributes:
        prompt: length of every prompt, except in the mix ``mixed``.
        output: length of every output, except in the mix ``mixed``.
        mixed_prompts: shortest and longest prompt of the mix ``mixed``. All lengths between the two are equally likely.
        mixed_outputs: shortest and longest output of the mix ``mixed``. All lengths between the two are equally likely.
        shared: number of tokens at the start that all prompts of the mix ``prefix`` have in common.
        samples: largest number of continuations of one prompt in the mix ``samples``.
    """

    prompt: int
    output: int
    mixed_prompts: tuple[int, int]
    mixed_outputs: tuple[int, int]
    shared: int
    samples: int

    def longest(self, mixes: Sequence[str]) -> int:
        """The largest number of tokens of a prompt and its output together, in any of the mixes."""
        mixed = self.mixed_prompts[1] + self.mixed_outputs[1] if "mixed" in mixes else 0
        return max(mixed, self.prompt + self.output if set(mixes) - {"mixed"} else 0)


def choices_per_request(mix: str, shape: Shape, slots: int) -> int:
    """The number of continuations that each request asks for.

    ``slots`` is the number of sequences that run at the same time. It is a multiple of the returned number, so that
    whole requests fill all slots.
    """
    return math.gcd(slots, shape.samples) if mix == "samples" else 1


def make_requests(
    mix: str, shape: Shape, *, count: int, choices: int, vocabulary: int, seed: int, content_seed: Sequence[int]
) -> list[BenchRequest]:
    """Return ``count`` requests of one of :data:`MIXES`. Each asks for ``choices`` continuations of its prompt.

    The lengths are drawn with ``seed``. The prompts' tokens are drawn with ``content_seed`` from the token ids below
    ``vocabulary``.
    """
    lengths, content = np.random.default_rng(seed), np.random.default_rng(content_seed)
    shared = content.integers(vocabulary, size=shape.shared).tolist()
    requests = []
    for _ in range(count):
        prompt, output = shape.prompt, shape.output
        if mix == "mixed":
            prompt = int(lengths.integers(*shape.mixed_prompts, endpoint=True))
            output = int(lengths.integers(*shape.mixed_outputs, endpoint=True))
        ids = content.integers(vocabulary, size=prompt).tolist()
        if mix == "prefix":
            ids[: len(shared)] = shared
        requests.append(BenchRequest(tuple(ids), output, choices, 1.0 if mix == "samples" else 0.0))
    return requests


@dataclasses.dataclass(frozen=True)
class Load:
    """Decides when requests are sent. Times are in seconds since the start of the run.

    In a closed loop, ``arrivals`` is empty, and each of ``concurrency`` users sends a request as soon as the user's
    previous request is answered. In an open loop, requests are sent at the ascending times ``arrivals``, whether or not
    earlier requests have been answered.
    """

    concurrency: int = 0
    arrivals: Sequence[float] = ()

    def due(self, number: int, now: float, in_flight: int) -> bool:
        """Whether to send request ``number`` at the time ``now``, while ``in_flight`` requests are not answered yet."""
        return self.arrivals[number] <= now if self.arrivals else in_flight < self.concurrency

    def intended(self, number: int, now: float) -> float:
        """The time at which request ``number`` was due; ``now`` in a closed loop.

        Latencies are measured from this time.
        """
        return self.arrivals[number] if self.arrivals else now


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """The times in seconds of the first ``count`` events of a Poisson process with ``rate`` events per second."""
    times: list[float] = np.random.default_rng(seed).exponential(1 / rate, count).cumsum().tolist()
    return times
