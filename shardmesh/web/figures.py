"""`/metrics`: figures for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Response

from shardmesh.web.metrics import CONTENT_TYPE
from shardmesh.web.routes import GatewayOfApp

router = APIRouter(tags=["operation"])


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(gateway: GatewayOfApp) -> Response:
    """All figures of this gateway, and of the mesh as it sees it."""
    return Response(gateway.metrics.text(), media_type=CONTENT_TYPE)
