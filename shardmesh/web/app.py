"""The ASGI application: all routes over one gateway."""

from __future__ import annotations

from fastapi import FastAPI

import shardmesh
from shardmesh.web import console_routes, health
from shardmesh.web.gateway import Gateway


def create_app(gateway: Gateway) -> FastAPI:
    """The application for a gateway that is open; serving it is `web.server`'s."""
    app = FastAPI(
        title="Shardmesh",
        version=shardmesh.__version__,
        description="One large language model on several ordinary machines.",
        docs_url=None,  # its page would load from elsewhere
        redoc_url=None,
    )
    app.state.gateway = gateway
    app.include_router(health.router)
    app.include_router(console_routes.router)
    app.include_router(console_routes.page)
    return app
