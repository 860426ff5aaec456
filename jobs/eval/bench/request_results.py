"""The results of a benchmark's requests, and the summary of a run that is computed from these results."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """Token counts of one choice, which is one of the answers to a request.

    If the server does not count each choice, the counts are those of the whole request.
    """

    prompt: int
    output: int
    cached: int | None  # prompt tokens found in the prefix cache; None if the server does not report them


@dataclasses.dataclass
class RequestResult:
    """The timing and the outcome of one request. All times are seconds since the start of the run.

    Attributes:
        intended: when the request should have been sent. Latencies are measured from this time.
        sent: when the request was sent.
        finished: when the request's last choice ended, or when the request failed.
        first_tokens: when the first token of each choice arrived.
        gaps: seconds between consecutive tokens of a choice. If tokens arrive together, the time since the token before
            them is divided equally among them. Tokens that arrive together with the first token have the gap 0.
        counts: token counts of each choice, or of the whole request; empty if the request failed.
        error: a short description of the failure; empty if the request was answered. Equal causes have equal
            descriptions.
        refused: whether the request failed because the server had no room.
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
        """Record that ``count`` tokens of the choice with the index ``choice`` arrived at the time ``now``."""
        if count == 0:
            return
        if choice not in self.first_tokens:
            self.first_tokens[choice] = now
            self.gaps += [0.0] * (count - 1)
        else:
            self.gaps += [(now - self._last[choice]) / count] * count
        self._last[choice] = now

    def failed(self, now: float, error: str, *, refused: bool = False) -> None:
        """Record that the request was not answered completely."""
        self.finished, self.error, self.refused, self.counts = now, error, refused, []


@dataclasses.dataclass(frozen=True)
class Summary:
    """The numbers that summarize one run. Times are in seconds. A number is None if no answered request provides it.

    Attributes:
        errors: the number of failed or refused requests for each error.
        seconds: from the start of the run to the end of the last request.
        time_to_first_token: median and 95th percentile over the choices of the answered requests.
        inter_token_latency: median and 95th percentile over the tokens of the answered requests.
        send_delay_p95: 95th percentile of the delay between the intended and the actual sending of a request. If the
            delay is large, the sending machine limits the throughput.
        output_tokens: tokens of answered requests only.
        cached_share: share of the prompt tokens that were found in the prefix cache.
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


def summarize(results: Sequence[RequestResult]) -> Summary:
    """Summarize a finished run. ``results`` has one result for each request and is not empty."""
    answered = [result for result in results if not result.error]
    refused = sum(result.refused for result in results)
    seconds = max(result.finished for result in results)
    counts = [count for result in answered for count in result.counts]
    reported = [count for count in counts if count.cached is not None]
    output_tokens = sum(count.output for count in counts)
    return Summary(
        requests=len(results),
        answered=len(answered),
        refused=refused,
        failed=len(results) - len(answered) - refused,
        errors=dict(Counter(result.error for result in results if result.error)),
        seconds=seconds,
        time_to_first_token=_p50_p95([t - r.intended for r in answered for t in r.first_tokens.values()]),
        inter_token_latency=_p50_p95([gap for result in answered for gap in result.gaps]),
        send_delay_p95=percentile([result.sent - result.intended for result in results], 95),
        prompt_tokens=sum(count.prompt for count in counts),
        output_tokens=output_tokens,
        tokens_per_second=output_tokens / seconds,
        requests_per_second=len(answered) / seconds,
        cached_share=sum(c.cached or 0 for c in reported) / sum(c.prompt for c in reported) if reported else None,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """A percentile of the values, interpolated linearly between the two nearest values."""
    return float(np.percentile(values, percent))


def _p50_p95(values: Sequence[float]) -> tuple[float, float] | None:
    return (percentile(values, 50), percentile(values, 95)) if values else None
