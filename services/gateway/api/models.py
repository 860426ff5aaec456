"""`GET /v1/models`: the models that the engines serve."""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter

from services.gateway.api.dependencies import PoolDep
from services.gateway.engines.model import ServedModel
from services.gateway.errors import ERROR_RESPONSES, no_engine

router = APIRouter(tags=["OpenAI API"], responses=ERROR_RESPONSES)


@router.get("/v1/models", summary="List the models")
async def list_models(pool: PoolDep) -> dict[str, Any]:
    """The models that requests can use now, including aliases; an empty list while no model is loaded."""
    served = pool.models()
    names = [*served, *(alias for alias in pool.settings.model_aliases if served and alias not in served)]
    return {"object": "list", "data": [_describe(_named(name, served), name) for name in names]}


@router.get("/v1/models/{model:path}", summary="Describe a model")
async def retrieve_model(model: str, pool: PoolDep) -> dict[str, Any]:
    """Describe the model with this name or alias."""
    served = pool.models()
    if model in served or (served and model in pool.settings.model_aliases):
        return _describe(_named(model, served), model)
    pool.model(model)  # raises the error 404 if no engine has the model
    raise no_engine()


def _named(name: str, served: Mapping[str, ServedModel]) -> ServedModel:
    """Returns the model that ``name`` stands for. An alias stands for the first served model."""
    return served[name] if name in served else next(iter(served.values()))


def _describe(model: ServedModel, name: str) -> dict[str, Any]:
    info = model.info
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "nanochat",
        "root": info.name,
        "max_model_len": info.context_length,  # vLLM's name of this field
        "nanochat": {
            "revision": info.revision,
            "context_length": info.context_length,
            "vocab_size": model.tokenizer.vocab_size,
            "parameters": info.parameters,
            "compute_dtype": info.compute_dtype,
            "examples": list(info.examples),
        },
    }
