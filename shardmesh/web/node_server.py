"""A listener's own HTTP API: the operator's part of the gateway's, and figures."""

from __future__ import annotations

import logging
from typing import Any
from urllib.parse import quote

import trio
from fastapi import FastAPI

import shardmesh
from shardmesh.listener.node import Node
from shardmesh.listener.node_options import ServeHttp
from shardmesh.swarm.directory import Directory
from shardmesh.swarm.host import Host
from shardmesh.web import node_routes
from shardmesh.web.answers import ERROR_ANSWERS
from shardmesh.web.errors import handle_errors
from shardmesh.web.events import EventHub
from shardmesh.web.guard import Guard, GuardSettings
from shardmesh.web.head import HeadAsGet
from shardmesh.web.node_facts import NodeFacts
from shardmesh.web.openapi import documented
from shardmesh.web.server import bind_sockets, serve_app
from shardmesh.web.tokens import ApiTokens
from shardmesh.web.watch import MeshWatch

logger = logging.getLogger("shardmesh")

HOST = "127.0.0.1"


def create_node_app(facts: NodeFacts) -> FastAPI:
    """The application of a listener."""
    app = FastAPI(title="Shardmesh node", version=shardmesh.__version__, docs_url=None)
    app.state.node = facts
    app.include_router(node_routes.router, responses=ERROR_ANSWERS)
    handle_errors(app)
    app.add_middleware(HeadAsGet)
    app.openapi = documented(app)  # type: ignore[method-assign]
    return app


def node_headers(facts: NodeFacts) -> dict[str, str]:
    """The headers that every answer of a node carries; a name is written as in a URL."""
    name = quote(facts.identity.name, safe=" !#$&'()*+,-./:;<=>?@[]^_`{|}~")
    return {"X-Node-ID": facts.host.peer_id, "X-Node-Name": name}


def node_server(port: int) -> ServeHttp:
    """Serves a listener's API on loopback, and takes the port at once.

    Raises InputError (theirs) for a taken port.
    """
    sockets = bind_sockets(HOST, [port])

    async def serve(node: Node, host: Host, directory: Directory) -> None:
        own_port = int(sockets[0].getsockname()[1])
        logger.info("[WEB] HTTP on http://%s:%d/v1/node/info", HOST, own_port)
        facts = _facts(node, host, directory)
        watch = MeshWatch(directory, facts.events, reports={}, is_busy=lambda peer_id: False)
        settings = GuardSettings(tokens=ApiTokens(), ports=frozenset({own_port}))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            await serve_app(Guard(create_node_app(facts), settings, node_headers(facts)), sockets)

    return serve


def _facts(node: Node, host: Host, directory: Directory) -> NodeFacts:
    def own_status() -> dict[str, Any]:
        status = node.supervisor.status
        return {"shard_state": status.state}

    return NodeFacts(
        kind="listener",
        identity=node.called,
        cluster=node.options.cluster,
        host=host,
        announcements=directory.all,
        events=EventHub(),
        disk=node.options.shards_dir,
        own_status=own_status,
    )
