"""What goes into the engine and what comes out: requests, sampling parameters, tool policy and outputs."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from nanochat_core.errors import UserError

MAX_LOGPROBS = 128
# What is added to logits or multiplies them stays far from where float32 ends.
MAX_BIAS = 1000.0
REPETITION_PENALTIES = 0.01, 100.0
MAX_TEMPERATURE = 1000.0


def _require(valid: bool, name: str, value: object, allowed: str) -> None:
    if not valid:
        raise UserError(f"{name} is {value}; it must be {allowed}")


def _require_bias(name: str, value: float) -> None:
    _require(-MAX_BIAS <= value <= MAX_BIAS, name, value, f"between {-MAX_BIAS:g} and {MAX_BIAS:g}")


class FinishReason(enum.Enum):
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"


class ConstraintKind(enum.Enum):
    """How a :class:`Constraint` is written."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What the text of a completion must match. Special tokens are no text: a constrained completion has none.

    Attributes:
        source: a JSON schema as JSON, or a regular expression that the whole text matches; empty for any JSON object.
    """

    kind: ConstraintKind
    source: str = ""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn; the defaults are plain greedy decoding.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens (and those tied with the last of them); 0 disables.
        top_p: keep the smallest set of most likely tokens whose probability reaches p; 1 disables.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0 disables.
        repetition_penalty: divides positive and multiplies negative logits of tokens that occur in the prompt or the
            completion; 1 disables.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens that occur in the completion, once
            and once per occurrence.
        seed: samples depend on (seed, choice, position) and the logits alone; None lets the engine draw one.
        max_tokens: sampled and tool tokens together; 0 means up to the context length.
        stop_token_ids: ends the sequence; the token itself is reported last.
        logprobs: number of most likely alternatives reported with each sampled token; None reports nothing.
        logit_bias: added to the logits, by token id.
        constraint: what the text must match; None is anything. Stop tokens can then come only where the text matches.

    Raises:
        UserError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    constraint: Constraint | None = None

    @property
    def looks_back(self) -> bool:
        """Whether earlier tokens change the logits of later ones."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def __post_init__(self) -> None:
        most = MAX_TEMPERATURE
        _require(0 <= self.temperature <= most, "temperature", self.temperature, f"between 0 (greedy) and {most:g}")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or a positive number")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        least, most = REPETITION_PENALTIES
        # Over the wire it comes as a float32, in which there is no 0.01.
        _require(
            least * (1 - 1e-6) <= self.repetition_penalty <= most,
            "repetition_penalty",
            self.repetition_penalty,
            f"between {least} and {most:g}",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _require_bias(name, getattr(self, name))
        _require(self.max_tokens >= 0, "max_tokens", self.max_tokens, "0 (up to the context length) or more")
        if self.logprobs is not None:
            _require(0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", self.logprobs, f"between 0 and {MAX_LOGPROBS}")
        for token, bias in self.logit_bias.items():
            _require_bias(f"logit_bias[{token}]", bias)


@dataclasses.dataclass(frozen=True)
class ToolPolicy:
    """Whether the model may call Python, and how much of it.

    Attributes:
        enabled: False makes the python tokens ordinary ones.
        max_calls: calls per sequence; 0 means the engine's default. Further calls get an error to read.
        max_output_tokens: tokens of output appended per call; 0 means the engine's default.
    """

    enabled: bool = False
    max_calls: int = 0
    max_output_tokens: int = 0


NO_TOOLS = ToolPolicy()


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue ``n`` times.

    Attributes:
        id: unique among the requests in flight; appears in logs and goes to the sandbox.
        prompt: token ids.
        tools: off for a request with a constraint, whatever it says.
        priority: lower values are scheduled first; equal values first come, first served.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    n: int = 1
    tools: ToolPolicy = NO_TOOLS
    priority: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
    """One token of a completion.

    Attributes:
        logprob: natural log of its probability under the unmodified distribution, when asked for.
        top_logprobs: (token id, logprob) of the most likely alternatives, best first.
        forced: put there by a tool's output instead of the model.
    """

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    forced: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCall:
    """The model asked for Python to run; ``call_index`` counts from 0 within the choice."""

    call_index: int
    code: str


@dataclasses.dataclass(frozen=True, slots=True)
class ToolResult:
    """What a call gave back; ``output`` is the text that the model reads."""

    call_index: int
    status: str
    output: str
    duration_seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one choice; ``completion_tokens`` includes tool output."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int


@dataclasses.dataclass(slots=True)
class Output:
    """News of one choice. Tool events come after the tokens; ``usage`` is set with ``finish_reason``.

    With ``error`` the whole request has ended, its other choices too.
    """

    request_id: str
    index: int
    tokens: list[Token] = dataclasses.field(default_factory=list)
    tool_events: list[ToolCall | ToolResult] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: Exception | None = None

    def can_absorb(self, later: Output) -> bool:
        """Whether ``later`` (of the same choice) can be joined to this one without reordering tokens and events."""
        return not self.tool_events or not later.tokens

    def absorb(self, later: Output) -> None:
        """Join ``later`` to this one; only if :meth:`can_absorb`."""
        self.tokens += later.tokens
        self.tool_events += later.tool_events
        self.finish_reason, self.usage = later.finish_reason, later.usage


@dataclasses.dataclass(slots=True)
class Completion:
    """Everything that came of one choice, for callers that do not stream."""

    tokens: list[Token] = dataclasses.field(default_factory=list)
    tool_events: list[ToolCall | ToolResult] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    def append(self, output: Output) -> None:
        """Take the next output of this choice."""
        self.tokens += output.tokens
        self.tool_events += output.tool_events
        self.finish_reason, self.usage = output.finish_reason, output.usage
