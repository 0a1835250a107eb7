"""`/health`: whether a prompt could be answered now."""

from __future__ import annotations

from typing import Literal

import pydantic
from fastapi import APIRouter, Response

from shardmesh.coordinator.chain import missing_layers, models_of
from shardmesh.coordinator.coordinator import replica_of
from shardmesh.web.routes import GatewayOfApp, ranges_json

router = APIRouter(tags=["operation"])


class ModelHealth(pydantic.BaseModel):
    """One model of the mesh."""

    model: str
    n_layer: int
    missing_layers: list[list[int]]  # half-open ranges


class Health(pydantic.BaseModel):
    """`ok` once at least one model has all its layers."""

    status: Literal["ok", "incomplete"]
    models: list[ModelHealth]


@router.get("/health", responses={503: {"model": Health, "description": "No model is complete."}})
async def health(gateway: GatewayOfApp, response: Response) -> Health:
    """Whether a prompt could be answered now; names the layers that nobody serves."""
    replicas = [replica_of(a) for a in gateway.directory.all() if a.total_layers]
    models = [
        ModelHealth(
            model=name, n_layer=found[0].n_layer, missing_layers=ranges_json(missing_layers(found))
        )
        for (name, _), found in sorted(models_of(replicas).items())
    ]
    is_ok = any(not model.missing_layers for model in models)
    response.status_code = 200 if is_ok else 503
    return Health(status="ok" if is_ok else "incomplete", models=models)
