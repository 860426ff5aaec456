"""`GET /v1/models`."""

from typing import Any

from fastapi import APIRouter

from services.gateway.api.dependencies import PoolDep
from services.gateway.engines.model import ServedModel
from services.gateway.errors import ERROR_RESPONSES, no_engine

router = APIRouter(tags=["OpenAI API"], responses=ERROR_RESPONSES)


@router.get("/v1/models", summary="List the models")
async def list_models(pool: PoolDep) -> dict[str, Any]:
    """The models that requests can use now; an empty list while no model is loaded."""
    return {"object": "list", "data": [_describe(model) for model in pool.models().values()]}


@router.get("/v1/models/{model:path}", summary="Describe a model")
async def retrieve_model(model: str, pool: PoolDep) -> dict[str, Any]:
    """One model, by its name or an alias."""
    served = pool.models()
    if model in served:
        return _describe(served[model])
    if served and model in pool.settings.model_aliases:
        return _describe(next(iter(served.values()))) | {"id": model}
    pool.model(model)  # raises the error 404 if no engine has the model
    raise no_engine()


def _describe(model: ServedModel) -> dict[str, Any]:
    info = model.info
    return {
        "id": info.name,
        "object": "model",
        "created": model.created,
        "owned_by": "nanochat",
        "nanochat": {
            "revision": info.revision,
            "context_length": info.context_length,
            "vocab_size": model.tokenizer.vocab_size,
            "parameters": info.parameters,
            "compute_dtype": info.compute_dtype,
        },
    }
