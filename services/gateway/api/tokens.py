"""`POST /tokenize` and `POST /detokenize`: the served model's tokenizer."""

from typing import Any

import orjson
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from nanochat_core.errors import UserError
from services.gateway.api.dependencies import PoolDep
from services.gateway.api.json_body import JsonRoute
from services.gateway.engines.request import conversation, encode_text, encode_turns, ending, off_loop
from services.gateway.errors import ERROR_RESPONSES, invalid_value, shown
from services.gateway.schemas import DetokenizeRequest, TokenizeRequest

router = APIRouter(tags=["Tokens"], responses=ERROR_RESPONSES, route_class=JsonRoute)


@router.post("/tokenize", summary="Encode text or a conversation", response_class=JSONResponse)
async def tokenize(body: TokenizeRequest, pool: PoolDep) -> Response:
    """The token ids of a text or of a conversation's prompt, even if they are more than the context length."""
    _, model = pool.pick(body.model)
    if body.messages is not None:
        turns = conversation(body.messages)
        ids = await encode_turns(model, turns, ending(body, turns))
    else:
        ids = await encode_text(model, body.prompt or "", bos=body.add_special_tokens is not False)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": model.info.context_length, "tokens": ids}
    if body.return_token_strs:
        decode = model.tokenizer.decode
        answer["token_strs"] = await off_loop(len(ids), lambda: [decode([token_id]) for token_id in ids])
    # orjson writes the answer, because FastAPI's own encoder would take a second for a million tokens.
    return Response(orjson.dumps(answer), media_type="application/json")


@router.post("/detokenize", summary="Decode token ids")
async def detokenize(body: DetokenizeRequest, pool: PoolDep) -> dict[str, str]:
    """The text of token ids; special tokens appear by name, and invalid UTF-8 appears as U+FFFD."""
    _, model = pool.pick(body.model)
    try:
        return {"prompt": await off_loop(len(body.tokens), lambda: model.tokenizer.decode(body.tokens))}
    except UserError as error:
        raise invalid_value(f"Invalid tokens: {shown(str(error))}.", "tokens") from error
