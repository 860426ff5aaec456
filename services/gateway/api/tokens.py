"""`POST /tokenize` and `POST /detokenize`: the model's tokens without the model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from nanochat_core.errors import UserError
from services.gateway.api.dependencies import Gateway, GatewayDep
from services.gateway.engines.prompts import conversation, encode_chat, encode_text
from services.gateway.engines.served_model import ServedModel
from services.gateway.errors import ERROR_RESPONSES, bad_request
from services.gateway.schemas import DetokenizeRequest, TokenizeRequest, refuse_unsupported_messages

router = APIRouter(tags=["Tokens"], responses=ERROR_RESPONSES)


@router.post("/tokenize", summary="Encode text or a conversation")
async def tokenize(body: TokenizeRequest, gateway: GatewayDep) -> dict[str, Any]:
    """Token ids of a text, or of the prompt that a conversation makes."""
    model = _model(gateway, body.model)
    if body.messages is not None:
        refuse_unsupported_messages(body.messages)
        ids = await encode_chat(model, conversation(body.messages))
    else:
        ids = await encode_text(model, body.prompt or "", "prompt", bos=body.add_special_tokens is not False)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": model.context_length, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [model.tokenizer.decode([token_id]) for token_id in ids]
    return answer


@router.post("/detokenize", summary="Decode token ids")
async def detokenize(body: DetokenizeRequest, gateway: GatewayDep) -> dict[str, str]:
    """The text of token ids; special tokens appear by name, invalid UTF-8 as U+FFFD."""
    model = _model(gateway, body.model)
    try:
        return {"prompt": model.tokenizer.decode(body.tokens)}
    except UserError as error:
        raise bad_request(f"Invalid tokens: {error}.", "tokens", "invalid_value") from error


def _model(gateway: Gateway, name: str | None) -> ServedModel:
    model = gateway.pool.select(name or None).model
    assert model is not None, "select() gives replicas with a model only"
    return model
