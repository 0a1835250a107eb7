"""`/metrics`: figures for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Response

from shardmesh.coordinator.chain import missing_layers, models_of
from shardmesh.coordinator.coordinator import replica_of
from shardmesh.web.gateway import Gateway
from shardmesh.web.metrics import CONTENT_TYPE
from shardmesh.web.queue import capacity
from shardmesh.web.routes import GatewayOfApp

router = APIRouter(tags=["operation"])


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(gateway: GatewayOfApp) -> Response:
    """All figures of this gateway."""
    note_mesh(gateway)
    return Response(gateway.metrics.text(), media_type=CONTENT_TYPE)


def note_mesh(gateway: Gateway) -> None:
    """Sets the figures that say how things stand now."""
    announcements = gateway.directory.all()
    replicas = [replica_of(a) for a in announcements if a.total_layers]
    n_parallel = {a.peer_id: a.capabilities.n_parallel for a in announcements}
    n_loaded = sum(a.capabilities.shard_loaded for a in announcements)
    set_figure = gateway.metrics.set
    set_figure("nodes", n_loaded, "yes")
    set_figure("nodes", len(announcements) - n_loaded, "no")
    for (name, _), found in models_of(replicas).items():
        is_complete = not missing_layers(found)
        set_figure("model_complete", is_complete, name)
        set_figure("kv_sequences", capacity(found, n_parallel) if is_complete else 0, name)
    for name, queue in gateway.queues.items():
        set_figure("kv_sequences_used", queue.n_running, name)
        set_figure("requests_waiting", queue.n_waiting, name)
