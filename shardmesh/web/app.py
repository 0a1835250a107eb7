"""The ASGI application: all routes over one gateway."""

from __future__ import annotations

from fastapi import FastAPI

import shardmesh
from shardmesh.web import (
    chat,
    completions,
    console_routes,
    docs_page,
    embeddings,
    figures,
    health,
    models,
    node_routes,
    texts,
)
from shardmesh.web.answers import ERROR_ANSWERS
from shardmesh.web.errors import handle_errors
from shardmesh.web.gateway import Gateway
from shardmesh.web.head import HeadAsGet
from shardmesh.web.openapi import documented


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
    app.state.node = gateway.node
    for routes in (
        chat,
        completions,
        models,
        embeddings,
        texts,
        health,
        figures,
        node_routes,
        console_routes,
    ):
        app.include_router(routes.router, responses=ERROR_ANSWERS)
    app.include_router(docs_page.router)
    app.include_router(console_routes.page)
    handle_errors(app)
    app.add_middleware(HeadAsGet)
    app.openapi = documented(app)  # type: ignore[method-assign]
    return app
