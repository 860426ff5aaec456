"""The engine's reports about its work: its load, and events for metrics."""

import dataclasses
import time
from collections.abc import Iterable

from nanochat_core.engine.scheduler import Chunk


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """The engine's load: numbers of sequences, of blocks in the fullest cache group, and of tokens to compute."""

    running: int = 0
    waiting: int = 0
    parked: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    waiting_tokens: int = 0


class Observer:
    """Receives the engine's events, for metrics. This class ignores all events; subclasses override methods.

    Methods are called on the engine's thread. Times are in seconds.
    """

    def admitted(self, queued: float, prompt_tokens: int, cached_tokens: int) -> None: ...
    def preempted(self, sequences: int) -> None: ...
    def out_of_memory(self) -> None: ...
    def first_token(self, since_arrival: float) -> None: ...
    def next_token(self, since_last: float) -> None: ...
    def tool_called(self, status: str) -> None: ...
    def finished(self, reason: str, since_arrival: float) -> None: ...
    def speculated(self, drafted: int, accepted: int) -> None: ...
    def stepped(self, duration: float, generated_tokens: int) -> None: ...


def note_admissions(observer: Observer, chunks: Iterable[Chunk]) -> None:
    """Report each sequence that runs for the first time."""
    for chunk in chunks:
        seq = chunk.seq
        if seq.admitted_at is None:
            seq.admitted_at = time.monotonic()
            observer.admitted(seq.admitted_at - seq.arrived_at, seq.prompt_length, seq.cached_prompt_tokens)


def note_tokens(observer: Observer, chunk: Chunk, count: int) -> None:
    """Report ``count`` sampled tokens of a chunk. The time since the previous token is divided equally among them.

    If they are the first sampled tokens of the sequence, :meth:`Observer.first_token` is called once instead of
    :meth:`Observer.next_token` for each token.
    """
    seq, now = chunk.seq, time.monotonic()
    if seq.last_token_at is None:
        observer.first_token(now - seq.arrived_at)
    else:
        for _ in range(count):
            observer.next_token((now - seq.last_token_at) / count)
    seq.last_token_at = now
    if chunk.draft:
        observer.speculated(len(chunk.draft), count - 1)
