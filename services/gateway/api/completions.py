"""`POST /v1/completions`: the model continues texts, without turns and without tools."""

import codecs
import functools
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response

from nanochat_core.protos import engine_pb2
from services.gateway.answer.choice_answer import ChoiceAnswer
from services.gateway.answer.choice_decoder import Delta
from services.gateway.answer.logprobs import completion_logprobs
from services.gateway.api.dependencies import PoolDep
from services.gateway.api.examples import COMPLETION_RESPONSES
from services.gateway.api.json_body import JsonRoute
from services.gateway.api.parameters import check_choices, check_known, check_prompts
from services.gateway.engines.pool import EnginePool
from services.gateway.engines.request import encode_prompt
from services.gateway.errors import ERROR_RESPONSES
from services.gateway.schemas import CompletionRequest

router = APIRouter(tags=["OpenAI API"], responses=ERROR_RESPONSES, route_class=JsonRoute)


@router.post("/v1/completions", summary="Continue a text", responses=COMPLETION_RESPONSES)
async def create_completion(body: CompletionRequest, request: Request, pool: PoolDep) -> Response:
    """Write the continuation of a text.

    A prompt of token ids is used unchanged. The token that begins documents is put in front of a text prompt. With
    `echo` and `logprobs`, the answer contains the log probabilities of the prompt's tokens. With `max_tokens` 0, the
    answer contains no continuation.
    """
    check_known(body, pool.settings)
    check_choices(body.n or 1, pool.settings)
    check_prompts(len(body.prompt), pool.settings)
    return await _CompletionAnswer(request, pool, body).respond()


class _CompletionAnswer(ChoiceAnswer):
    id_prefix = "cmpl-"
    kind = chunk_kind = "text_completion"
    raw = True

    def __init__(self, request: Request, pool: EnginePool, body: CompletionRequest) -> None:
        super().__init__(request, pool, body, [functools.partial(encode_prompt, prompt=each) for each in body.prompt])
        self._completion = body
        self._echoes: dict[int, str] = {}  # the echoed prompts of choices that have begun, by the choice's index

    def choice(self, index: int, delta: Delta) -> dict[str, Any]:
        return next(self.pieces(index, delta))

    def pieces(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        text, tokens, offsets = delta.text, delta.tokens, delta.offsets
        if self._completion.echo:
            first = index not in self._echoes
            if first:
                self._echoes[index] = self._prompt_text(index)
            echo = self._echoes[index]
            offsets = [len(echo) + offset for offset in offsets]
            if first:
                text = echo + text
            if first and self._completion.logprobs is not None:
                prompt = self._prompt_tokens(index, delta)
                tokens, offsets = prompt + tokens, self._prompt_offsets(index, prompt) + offsets
        if not (text or tokens or delta.finish_reason is not None):
            return
        logprobs = None
        if self._completion.logprobs is not None:
            logprobs = completion_logprobs(self.model(index).tokenizer, tokens, offsets)
        yield {"index": index, "text": text, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def _prompt_text(self, index: int) -> str:
        prompt = self._completion.prompt[index // self.n]
        return prompt if isinstance(prompt, str) else self.model(index).tokenizer.decode(prompt)

    def _prompt_tokens(self, index: int, delta: Delta) -> list[engine_pb2.Token]:
        """The tokens of the client's prompt, without the token that the gateway has put in front of a text prompt."""
        prompt = self._completion.prompt[index // self.n]
        first = [] if isinstance(prompt, str) else [engine_pb2.Token(id=prompt[0])]
        return first + delta.prompt_tokens

    def _prompt_offsets(self, index: int, tokens: list[engine_pb2.Token]) -> list[int]:
        """For each token, the number of complete characters before it."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        tokenizer = self.model(index).tokenizer
        offsets, length = [], 0
        for token in tokens:
            offsets.append(length)
            length += len(decoder.decode(tokenizer.decode_bytes([token.id])))
        return offsets
