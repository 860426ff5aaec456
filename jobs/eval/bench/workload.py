"""What a benchmark asks of an engine: requests of a mix, and when they are sent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

MIXES = ("fixed", "mixed", "samples", "prefix")


@dataclasses.dataclass(frozen=True)
class BenchRequest:
    """A prompt to continue ``n`` times by ``output_tokens`` each.

    Attributes:
        prompt: ids between 0 and the target's vocabulary.
        temperature: 0 is greedy.
    """

    prompt: tuple[int, ...]
    output_tokens: int
    n: int = 1
    temperature: float = 0.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """Lengths of requests in tokens.

    Attributes:
        prompt, output: of every request, except in ``mixed``.
        mixed_prompts, mixed_outputs: least and greatest length in ``mixed``, all equally likely.
        shared: tokens at the beginning of the prompt that are equal in all requests of ``prefix``.
        samples: most continuations of one prompt in ``samples``.
    """

    prompt: int
    output: int
    mixed_prompts: tuple[int, int]
    mixed_outputs: tuple[int, int]
    shared: int
    samples: int

    def longest(self, mixes: Sequence[str]) -> int:
        """The longest prompt of ``mixes`` with its output."""
        mixed = self.mixed_prompts[1] + self.mixed_outputs[1] if "mixed" in mixes else 0
        return max(mixed, self.prompt + self.output if set(mixes) - {"mixed"} else 0)


def choices_per_request(mix: str, shape: Shape, slots: int) -> int:
    """Continuations of each request, so that whole requests fill ``slots`` sequences."""
    return math.gcd(slots, shape.samples) if mix == "samples" else 1


def make_requests(
    mix: str, shape: Shape, *, count: int, choices: int, vocabulary: int, seed: int, content_seed: Sequence[int]
) -> list[BenchRequest]:
    """``count`` requests of one of :data:`MIXES`.

    Args:
        seed: decides the lengths.
        content_seed: numbers that decide the tokens of the prompts.
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


class Load(Protocol):
    """When requests are sent."""

    def due(self, number: int, now: float, in_flight: int) -> bool:
        """Whether request ``number`` is to be sent ``now`` (seconds since the start) beside ``in_flight`` others."""

    def intended(self, number: int, now: float) -> float:
        """When request ``number``, sent ``now``, should have been sent: its latencies count from there."""


@dataclasses.dataclass(frozen=True)
class ClosedLoop:
    """As many clients as ``concurrency``, each of which sends its next request when its last one is answered."""

    concurrency: int

    def due(self, number: int, now: float, in_flight: int) -> bool:  # noqa: ARG002
        return in_flight < self.concurrency

    def intended(self, number: int, now: float) -> float:  # noqa: ARG002
        return now


@dataclasses.dataclass(frozen=True)
class OpenLoop:
    """Requests arrive at their own times, whatever has become of those before.

    Attributes:
        arrivals: of each request, in seconds since the start, rising.
    """

    arrivals: Sequence[float]

    def due(self, number: int, now: float, in_flight: int) -> bool:  # noqa: ARG002
        return self.arrivals[number] <= now

    def intended(self, number: int, now: float) -> float:  # noqa: ARG002
        return self.arrivals[number]


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Times of the first ``count`` events of a Poisson process of ``rate`` per second, in seconds."""
    times: list[float] = np.random.default_rng(seed).exponential(1 / rate, count).cumsum().tolist()
    return times
