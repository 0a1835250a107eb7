"""`/v1/embeddings`: what a model makes of whole texts."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt
import pydantic
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from shardmesh.coordinator.chain import choose_model
from shardmesh.coordinator.coordinator import replica_of
from shardmesh.coordinator.embed import Embedding
from shardmesh.errors import InputError
from shardmesh.web.requests import EmbeddingBody
from shardmesh.web.routes import GatewayOfApp
from shardmesh.web.sse import while_wanted

router = APIRouter(tags=["OpenAI"])


class EmbeddingObject(pydantic.BaseModel):
    """One text's; numbers, or base64 of little-endian float32."""

    object: str
    index: int
    embedding: list[float] | str


class EmbeddingUsage(pydantic.BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(pydantic.BaseModel):
    object: str
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage


@router.post("/v1/embeddings", response_model=EmbeddingList)
async def embed(body: EmbeddingBody, request: Request, gateway: GatewayOfApp) -> JSONResponse:
    """Vectors of length 1 that stand for texts, one after the other."""
    if body.dimensions is not None:
        raise InputError("this model's embeddings cannot be shortened: leave `dimensions` out")
    replicas = choose_model([replica_of(a) for a in gateway.directory.all()], body.model)
    name = replicas[0].model_name
    found = await while_wanted(request, lambda: gateway.coordinator.embed(body.inputs, model=name))
    return JSONResponse(_answer(found or [], name, as_text=body.encoding_format == "base64"))


def _answer(found: list[Embedding], model: str, *, as_text: bool) -> dict[str, Any]:
    n_tokens = sum(each.n_tokens for each in found)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": _shown(each.unit(), as_text)}
            for i, each in enumerate(found)
        ],
        "model": model,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }


def _shown(values: npt.NDArray[np.float32], as_text: bool) -> list[float] | str:
    if as_text:
        return base64.b64encode(values.astype("<f4").tobytes()).decode()
    return [float(value) for value in values]
