"""The operator's API: `/v1/node/...`, `/v1/peers`, `/v1/mesh`, `/v1/events`."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import trio
from fastapi import APIRouter, Depends, Query, Response
from fastapi.requests import HTTPConnection

from shardmesh.web.node_facts import NodeFacts, capabilities_of, resources, shard_of
from shardmesh.web.sse import EventStream, SendEvent

router = APIRouter(tags=["operation"])

EVENTS_PING_S = 15.0
"""A stream of events says something this often, so that proxies leave it open."""

Json = dict[str, Any]


async def _facts_of_app(connection: HTTPConnection) -> NodeFacts:
    facts: NodeFacts = connection.app.state.node
    return facts


Node = Annotated[NodeFacts, Depends(_facts_of_app)]


def _answer(value: object) -> Response:
    """Plain values as JSON, past FastAPI's own way, which looks at each of thousands."""
    return Response(msgspec.json.encode(value), media_type="application/json")


@router.get("/v1/node/info", response_model=Json)
async def info(node: Node) -> Response:
    """Who this node is: its ids, its name, where it is, how it is reached."""
    return _answer(node.info())


@router.get("/v1/node/capabilities", response_model=Json)
async def capabilities(node: Node) -> Response:
    """What this node serves and can do."""
    own = node.own_announcement()
    return _answer(
        {
            "id": node.host.peer_id,
            "kind": node.kind,
            "shard": shard_of(own) if own else None,
            "capabilities": capabilities_of(own) if own else None,
        }
    )


@router.get("/v1/node/resources", response_model=Json)
async def node_resources(node: Node) -> Response:
    """Processor, memory and disk of this machine, now."""
    return _answer({"id": node.host.peer_id, **resources(node.disk)})


@router.get("/v1/node/status", response_model=Json)
async def status(node: Node) -> Response:
    """How this node is doing."""
    return _answer(node.status())


@router.get("/v1/peers", response_model=list[Json])
async def peers(node: Node) -> Response:
    """Every node that is known, with its shard, addresses, round trip and when it was heard of."""
    return _answer(node.peers())


@router.get("/v1/mesh", response_model=Json)
async def mesh(node: Node) -> Response:
    """The models of the mesh: stages, replicas, what is missing, and the chain of the moment."""
    return _answer(node.mesh())


@router.get(
    "/v1/events",
    response_class=Response,
    responses={
        200: {
            "description": "Events as they happen, without end.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    },
)
async def events(
    node: Node,
    all_kinds: Annotated[
        bool, Query(alias="all", description="Those of the moment too, such as requests.")
    ] = False,
) -> Response:
    """What happens in the mesh, as server-sent events."""

    async def produce(send: SendEvent) -> None:
        with node.events.subscribe() as news:
            await send({"kind": "hello", "node": node.info()})
            while True:
                with trio.move_on_after(EVENTS_PING_S) as scope:
                    event = await anext(news)
                if scope.cancelled_caught:
                    await send({"kind": "ping", "n_lost": news.n_lost})
                elif event.is_lasting or all_kinds:
                    await send(msgspec.to_builtins(event))

    return EventStream(produce)
