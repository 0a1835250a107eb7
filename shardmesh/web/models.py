"""`/v1/models`: what the mesh serves."""

from __future__ import annotations

from typing import Literal

import pydantic
from fastapi import APIRouter

from shardmesh.coordinator.chain import Replica, choose_model, missing_layers, models_of
from shardmesh.coordinator.coordinator import replica_of
from shardmesh.web.gateway import Gateway
from shardmesh.web.routes import GatewayOfApp, ranges_json

router = APIRouter(tags=["OpenAI"])


class ModelObject(pydantic.BaseModel):
    """One model, as OpenAI's clients know it, and what Shardmesh knows besides."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "shardmesh"
    n_layer: int
    n_ctx: int
    complete: bool
    missing_layers: list[list[int]]  # half-open ranges


class ModelList(pydantic.BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


@router.get("/v1/models")
async def models(gateway: GatewayOfApp) -> ModelList:
    """All models of which somebody serves a shard; `complete` ones answer."""
    names = sorted({name for name, _ in models_of(_replicas(gateway))})
    return ModelList(data=[_model(gateway, name) for name in names])


@router.get("/v1/models/{model_id:path}")
async def model(model_id: str, gateway: GatewayOfApp) -> ModelObject:
    """One model by its name."""
    return _model(gateway, model_id)


def _replicas(gateway: Gateway) -> list[Replica]:
    return [replica_of(a) for a in gateway.directory.all() if a.total_layers]


def _model(gateway: Gateway, name: str) -> ModelObject:
    replicas = choose_model(_replicas(gateway), name)
    missing = missing_layers(replicas)
    return ModelObject(
        id=name,
        created=gateway.started_at_s,
        n_layer=replicas[0].n_layer,
        n_ctx=min((r.n_ctx for r in replicas if r.shard_loaded), default=0),
        complete=not missing,
        missing_layers=ranges_json(missing),
    )
