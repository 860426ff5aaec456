"""The engine's input (requests with sampling parameters and a tool policy) and its output."""

from __future__ import annotations

import contextvars
import dataclasses
import enum
import math
from collections.abc import Mapping

from nanochat_core.constraints.constraint import Constraint
from nanochat_core.errors import UserError

MAX_LOGPROBS = 128
# Limits of sampling parameters that keep adjusted logits far inside the range of float32.
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


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Parameters for sampling the next token. By default, decoding is greedy.

    Values out of range raise a :class:`UserError`. With equal parameters, samples depend only on the seed, the choice,
    the position, the logits and, with penalties or a constraint, the earlier tokens. With a constraint, a stop token is
    possible only after a matching text.
    """

    temperature: float = 0.0  # 0, and any number below 0.0001, means greedy decoding
    top_k: int = 0  # keep the k most likely tokens, and tokens that tie with the last of them; 0 keeps all tokens
    top_p: float = 1.0  # keep the smallest set of most likely tokens whose probability reaches p, and ties; 1 keeps all
    min_p: float = 0.0  # keep tokens with at least this fraction of the highest probability; 0 keeps all
    # Changes the logits of tokens that occur in the prompt or the completion: a positive logit is divided by this
    # number, and a negative logit is multiplied by it. 1 changes nothing.
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # subtracted once from the logit of each token that occurs in the completion
    frequency_penalty: float = 0.0  # subtracted from a token's logit once per occurrence in the completion
    seed: int | None = None  # None lets the engine choose a seed
    max_tokens: int = 0  # maximum number of sampled tokens and tool tokens together; 0 means up to the context length
    stop_token_ids: frozenset[int] = frozenset()  # a sampled token of this set ends the sequence; it is still reported
    # For each sampled token, its log probability is reported, and also the log probabilities of this number of the most
    # likely tokens. None reports no log probabilities.
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)  # added to the logits, by token id
    constraint: Constraint | None = None
    # Like ``logprobs``, for each token of the prompt except the first. The prefix cache is then not read, because it
    # has no logits.
    prompt_logprobs: int | None = None
    min_tokens: int = 0  # no stop token is sampled before this number of tokens; not allowed with a constraint

    @property
    def looks_back(self) -> bool:
        """Whether earlier tokens change the logits of later tokens through a penalty."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def __post_init__(self) -> None:
        most = MAX_TEMPERATURE
        _require(0 <= self.temperature <= most, "temperature", self.temperature, f"between 0 (greedy) and {most:g}")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or a positive number")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        least, most = REPETITION_PENALTIES
        # Allow a rounding error: the value may have been sent as a float32, which cannot express 0.01 exactly.
        _require(
            least * (1 - 1e-6) <= self.repetition_penalty <= most,
            "repetition_penalty",
            self.repetition_penalty,
            f"between {least} and {most:g}",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _require_bias(name, getattr(self, name))
        _require(self.max_tokens >= 0, "max_tokens", self.max_tokens, "0 (up to the context length) or more")
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                _require(0 <= count <= MAX_LOGPROBS, name, count, f"between 0 and {MAX_LOGPROBS}")
        most_tokens = 0 if self.constraint is not None else self.max_tokens or math.inf
        _require(0 <= self.min_tokens <= most_tokens, "min_tokens", self.min_tokens, f"between 0 and {most_tokens}")
        for token, bias in self.logit_bias.items():
            _require_bias(f"logit_bias[{token}]", bias)


@dataclasses.dataclass(frozen=True)
class ToolPolicy:
    """Whether the model may call Python, and the limits of its calls. A limit of 0 means the engine's default.

    After ``max_calls`` calls of a choice, the model reads an error instead of the output of every further call.
    """

    enabled: bool = False  # if False, the Python tokens have no special meaning
    max_calls: int = 0
    max_output_tokens: int = 0  # largest number of tokens of one call's output


NO_TOOLS = ToolPolicy()


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
    """One token of a completion, or of a prompt whose log probabilities are requested.

    ``logprob``, if requested, is the natural logarithm of the token's probability before the constraint, penalties,
    biases, temperature and filters; None for a forced token. ``top_logprobs`` has (token id, logprob) of the most
    likely tokens, best first.
    """

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    forced: bool = False  # whether the token is part of a tool's output


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCall:
    """A Python call by the model; ``call_index`` counts from 0 within the choice."""

    call_index: int
    code: str


@dataclasses.dataclass(frozen=True, slots=True)
class Picture:
    """A picture that the code of a Python call made, such as ``figure-1.png`` of type ``image/png``."""

    name: str
    media_type: str
    content: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class ToolResult:
    """Result of a Python call; ``output`` is the text that the model reads. The model does not see the pictures."""

    call_index: int
    status: str
    output: str
    duration_seconds: float
    pictures: tuple[Picture, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Continuation:
    """All tokens and tool events that an engine with the same weights has already reported for one choice.

    Only the fields ``id`` and ``forced`` of a token are read. The result of the last call may be missing, and the
    tokens may end anywhere. If the choice is ``finished``, its tokens and events are ignored, and nothing is generated.
    """

    index: int
    tokens: tuple[Token, ...] = ()
    tool_events: tuple[ToolCall | ToolResult, ...] = ()
    finished: bool = False


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue ``n`` times.

    A choice with an entry in ``continued`` continues where the entry ends, as the engine that began the choice would
    have continued it, unless a rounding difference of the logits changes a token. If the temperature is above 0, this
    also needs a seed. The outputs contain only new tokens and events. Limits, penalties, constraint and usage apply to
    the whole choice.
    """

    id: str  # unique among the requests in flight; it appears in logs and is sent to the sandbox
    prompt: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    n: int = 1
    tools: ToolPolicy = NO_TOOLS  # ignored if the request has a constraint
    priority: int = 0  # lower values are scheduled first; equal values are scheduled in order of arrival
    continued: tuple[Continuation, ...] = ()
    caller: str = ""  # who sent the request, if that is known; callers with new constraints take turns
    # The request's Python calls run in this context, so that they belong to the request's trace.
    context: contextvars.Context | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def finished(self) -> set[int]:
        """Indices of the choices that were finished before this request. Nothing more is generated for them."""
        return {said.index for said in self.continued if said.finished}

    @property
    def unfinished(self) -> int:
        """Number of choices to generate."""
        return self.n - len(self.finished)


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one choice.

    ``completion_tokens`` includes tool output. ``cached_prompt_tokens`` were found in the prefix cache.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int


@dataclasses.dataclass(slots=True)
class Generated:
    """Successive tokens and tool events of one choice. ``finish_reason`` and ``usage`` are set at the choice's end.

    If the request sets ``prompt_logprobs``, ``prompt_tokens`` of a choice's first output are the prompt's tokens
    without the first one, which has no log probability. For a choice that continues the tokens of another engine,
    ``prompt_tokens`` is empty.
    """

    tokens: list[Token] = dataclasses.field(default_factory=list)
    tool_events: list[ToolCall | ToolResult] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    prompt_tokens: list[Token] = dataclasses.field(default_factory=list)

    def append(self, later: Output) -> None:
        """Append the next output of this choice."""
        self.prompt_tokens += later.prompt_tokens
        self.tokens += later.tokens
        self.tool_events += later.tool_events
        self.finish_reason, self.usage = later.finish_reason, later.usage


@dataclasses.dataclass(slots=True)
class Completion(Generated):
    """All outputs of one choice together, for callers that do not stream."""

    @property
    def token_ids(self) -> list[int]:
        return [token.id for token in self.tokens]


@dataclasses.dataclass(slots=True, kw_only=True)
class Output(Generated):
    """New tokens and tool events of one choice. All events of an output come after all tokens of the output.

    ``error`` ends all choices of the request. An output with ``draining`` is empty and says that the engine is shutting
    down.
    """

    request_id: str
    index: int
    error: Exception | None = None
    draining: bool = False

    def can_append(self, later: Output) -> bool:
        """Whether this output can :meth:`append` ``later`` and still keep the order of tokens and events."""
        return not self.draining and not later.draining and (not self.tool_events or not later.tokens)
