"""What became of the requests of a benchmark, and the figures that follow from it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """Of one choice, or of a whole request where the target tells no more.

    Attributes:
        cached: tokens of the prompt that were found in the prefix cache; None where the target does not tell.
    """

    prompt: int
    output: int
    cached: int | None


@dataclasses.dataclass
class Outcome:
    """One request. All times are seconds since the start of the run.

    Attributes:
        intended: when it should have been sent; latencies count from there.
        sent: when it was.
        finished: when its last choice ended, or when it failed.
        first_tokens: when the first token of each choice came.
        gaps: seconds between tokens that follow each other in a choice. Tokens that come together share the time since
            those before them evenly.
        counts: empty for a request that failed.
        error: what went wrong, in few words that are the same for the same cause; empty if nothing did.
        refused: whether the error is that there was no room.
    """

    intended: float
    sent: float
    finished: float = 0.0
    first_tokens: dict[int, float] = dataclasses.field(default_factory=dict)
    gaps: list[float] = dataclasses.field(default_factory=list)
    counts: list[TokenCounts] = dataclasses.field(default_factory=list)
    error: str = ""
    refused: bool = False
    _last: dict[int, float] = dataclasses.field(default_factory=dict)

    def tokens_came(self, now: float, choice: int, count: int) -> None:
        """Note ``count`` tokens of ``choice``."""
        if count == 0:
            return
        if choice not in self.first_tokens:
            self.first_tokens[choice] = now
            self.gaps += [0.0] * (count - 1)
        else:
            self.gaps += [(now - self._last[choice]) / count] * count
        self._last[choice] = now

    def failed(self, now: float, error: str, *, refused: bool = False) -> None:
        """Note the end of a request that was not answered, or not to its end."""
        self.finished, self.error, self.refused, self.counts = now, error, refused, []


@dataclasses.dataclass(frozen=True)
class Summary:
    """Figures of one run. Times in seconds; None where no answered request tells.

    Attributes:
        errors: requests by what went wrong, refusals included.
        seconds: from the start to the end of the last request.
        time_to_first_token, inter_token_latency: (p50, p95) of the answered requests' choices and tokens.
        send_delay_p95: how late requests were sent; if it is not small, the machine that sends them is the limit.
        output_tokens: of answered requests alone.
        cached_share: tokens of the prompts that were found in the prefix cache.
    """

    requests: int
    answered: int
    refused: int
    failed: int
    errors: dict[str, int]
    seconds: float
    time_to_first_token: tuple[float, float] | None
    inter_token_latency: tuple[float, float] | None
    send_delay_p95: float
    prompt_tokens: int
    output_tokens: int
    tokens_per_second: float
    requests_per_second: float
    cached_share: float | None


def summarize(outcomes: Sequence[Outcome]) -> Summary:
    """The figures of a run of at least one request, all of them ended."""
    answered = [outcome for outcome in outcomes if not outcome.error]
    refused = sum(outcome.refused for outcome in outcomes)
    seconds = max(outcome.finished for outcome in outcomes)
    counts = [count for outcome in answered for count in outcome.counts]
    told = [count for count in counts if count.cached is not None]
    output_tokens = sum(count.output for count in counts)
    return Summary(
        requests=len(outcomes),
        answered=len(answered),
        refused=refused,
        failed=len(outcomes) - len(answered) - refused,
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error)),
        seconds=seconds,
        time_to_first_token=_p50_p95([t - o.intended for o in answered for t in o.first_tokens.values()]),
        inter_token_latency=_p50_p95([gap for outcome in answered for gap in outcome.gaps]),
        send_delay_p95=percentile([outcome.sent - outcome.intended for outcome in outcomes], 95),
        prompt_tokens=sum(count.prompt for count in counts),
        output_tokens=output_tokens,
        tokens_per_second=output_tokens / seconds,
        requests_per_second=len(answered) / seconds,
        cached_share=sum(c.cached or 0 for c in told) / sum(c.prompt for c in told) if told else None,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest of the sorted values, the least of which is at 0 % and the greatest at 100 %."""
    return float(np.percentile(values, percent))


def _p50_p95(values: Sequence[float]) -> tuple[float, float] | None:
    return (percentile(values, 50), percentile(values, 95)) if values else None
