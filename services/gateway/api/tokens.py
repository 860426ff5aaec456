"""`POST /tokenize` and `POST /detokenize`: the served model's tokenizer."""

from typing import Any

from fastapi import APIRouter

from nanochat_core.errors import UserError
from services.gateway.api.dependencies import PoolDep
from services.gateway.engines.request import conversation, encode_chat, encode_text
from services.gateway.errors import ERROR_RESPONSES, invalid_value
from services.gateway.schemas import DetokenizeRequest, TokenizeRequest

router = APIRouter(tags=["Tokens"], responses=ERROR_RESPONSES)


@router.post("/tokenize", summary="Encode text or a conversation")
async def tokenize(body: TokenizeRequest, pool: PoolDep) -> dict[str, Any]:
    """Token ids of a text, or of the prompt that a conversation makes."""
    _, model = pool.pick(body.model)
    if body.messages is not None:
        ids = await encode_chat(model, conversation(body.messages))
    else:
        ids = await encode_text(model, body.prompt or "", bos=body.add_special_tokens is not False)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": model.info.context_length, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [model.tokenizer.decode([token_id]) for token_id in ids]
    return answer


@router.post("/detokenize", summary="Decode token ids")
async def detokenize(body: DetokenizeRequest, pool: PoolDep) -> dict[str, str]:
    """The text of token ids; special tokens appear by name, and invalid UTF-8 appears as U+FFFD."""
    _, model = pool.pick(body.model)
    try:
        return {"prompt": model.tokenizer.decode(body.tokens)}
    except UserError as error:
        raise invalid_value(f"Invalid tokens: {error}.", "tokens") from error
