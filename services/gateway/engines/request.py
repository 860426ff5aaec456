"""From a request's sampling parameters to the engine's."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence

from nanochat_core.protos import engine_pb2
from services.gateway.engines.served_model import ServedModel
from services.gateway.errors import bad_request
from services.gateway.schemas import ChatRequest, CompletionRequest, SamplingRequest
from services.gateway.settings import GatewaySettings

_SEEDS = 2**64
# To the engine 0 means "off"; to a client it is the narrowest choice there is.
_SMALLEST_TOP_P = 1e-6
_BIAS_LIMIT = 100


def choose_seed(request: SamplingRequest) -> int:
    """The request's seed, or a random one: a known seed is what lets another replica carry on with a stream."""
    return request.seed % _SEEDS if request.seed is not None else secrets.randbits(64)


def engine_request(
    request: ChatRequest | CompletionRequest,
    model: ServedModel,
    prompt: Sequence[int],
    settings: GatewaySettings,
    *,
    request_id: str,
    seed: int,
) -> engine_pb2.GenerateRequest:
    """What the engine is asked for.

    Args:
        prompt: token ids, fewer than the context length.

    Raises:
        ApiError: 400 for a logit bias on something that isn't a token of the model.
    """
    chat = isinstance(request, ChatRequest)
    limit = (request.max_completion_tokens if isinstance(request, ChatRequest) else None) or request.max_tokens
    room = model.context_length - len(prompt)
    sampling = engine_pb2.SamplingParams(
        temperature=settings.default_temperature if request.temperature is None else request.temperature,
        top_k=max(request.top_k or 0, 0),
        top_p=1.0 if request.top_p is None else max(request.top_p, _SMALLEST_TOP_P),
        min_p=request.min_p or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        seed=seed % _SEEDS,
        max_tokens=min(limit or settings.default_max_tokens or room, room),
        stop_token_ids=model.stop_token_ids,
        logprobs=_alternatives(request),
        logit_bias=_logit_bias(request.logit_bias or {}, model),
    )
    _constrain(sampling, request)
    return engine_pb2.GenerateRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        n=request.n or 1,
        sampling=sampling,
        tools=engine_pb2.ToolPolicy(enabled=chat),
        tokenizer_digest=model.tokenizer_digest,
    )


def _constrain(sampling: engine_pb2.SamplingParams, request: ChatRequest | CompletionRequest) -> None:
    """Say what the answer must match, if anything."""
    wanted = request.response_format if isinstance(request, ChatRequest) else None
    if request.regex is not None:
        sampling.regex = request.regex
    elif wanted is not None and wanted.type == "json_object":
        sampling.json_object = True
    elif wanted is not None and wanted.json_schema is not None and wanted.type == "json_schema":
        sampling.json_schema = json.dumps(wanted.json_schema.schema_)


def _alternatives(request: ChatRequest | CompletionRequest) -> int | None:
    """Alternatives to report with each token; ``None`` reports no log probabilities."""
    if isinstance(request, CompletionRequest):
        return request.logprobs
    return (request.top_logprobs or 0) if request.logprobs else None


def _logit_bias(bias: dict[str, float], model: ServedModel) -> dict[int, float]:
    checked = {}
    for key, value in bias.items():
        token_id = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else -1
        if not 0 <= token_id < model.tokenizer.vocab_size:
            raise bad_request(
                f"logit_bias names the token {key!r}; use ids from 0 to {model.tokenizer.vocab_size - 1}.",
                "logit_bias",
                "invalid_value",
            )
        if abs(value) > _BIAS_LIMIT:
            raise bad_request(
                f"logit_bias of token {key} is {value}; use -{_BIAS_LIMIT} to {_BIAS_LIMIT}.",
                "logit_bias",
                "invalid_value",
            )
        checked[token_id] = value
    return checked
