"""`POST /v1/completions`: the model continues texts, without turns and without tools."""

import functools
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response

from services.gateway.answer.choice_decoder import Delta
from services.gateway.answer.logprobs import completion_logprobs
from services.gateway.answer.response import Answer
from services.gateway.api.dependencies import PoolDep
from services.gateway.api.examples import COMPLETION_RESPONSES
from services.gateway.engines.request import check_choices, encode_prompt
from services.gateway.errors import ERROR_RESPONSES
from services.gateway.schemas import CompletionRequest

router = APIRouter(tags=["OpenAI API"], responses=ERROR_RESPONSES)


@router.post("/v1/completions", summary="Continue a text", responses=COMPLETION_RESPONSES)
async def create_completion(body: CompletionRequest, request: Request, pool: PoolDep) -> Response:
    """Write the continuation of a text.

    A prompt of token ids is used unchanged. A text prompt gets the token that begins documents in front.
    """
    check_choices((body.n or 1) * len(body.prompt), pool.settings)
    prompts = [functools.partial(encode_prompt, prompt=prompt) for prompt in body.prompt]
    return await _CompletionAnswer(request, pool, body, prompts).respond()


class _CompletionAnswer(Answer):
    id_prefix = "cmpl"
    kind = chunk_kind = "text_completion"
    raw = True

    def whole(self, index: int, delta: Delta) -> dict[str, Any]:
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = completion_logprobs(self.model(index).tokenizer, delta.tokens, delta.offsets)
        return {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def pieces(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        if delta or delta.finish_reason is not None:
            yield self.whole(index, delta)
