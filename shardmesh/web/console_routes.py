"""The console's page, its WebSocket, and the operator's calls that it makes."""

from __future__ import annotations

import functools
import hashlib
import mimetypes
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Annotated, Any, Final

import pydantic
import trio
from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.websockets import WebSocket, WebSocketDisconnect

from shardmesh.errors import BusyError, InputError
from shardmesh.swarm.commands import send_command
from shardmesh.web.event_store import EVENTS_ASKED_MAX
from shardmesh.web.feed import FEED_VERSION, Feed
from shardmesh.web.gateway import Gateway
from shardmesh.web.routes import GatewayOfApp
from shardmesh.wire.codec import encode_json
from shardmesh.wire.commands import LoadShardParams
from shardmesh.wire.limits import COMMAND_TIMEOUT_S, LOAD_TIMEOUT_S

page = APIRouter(include_in_schema=False)
router = APIRouter(tags=["operation"])

SOCKET_PROTOCOL: Final = "shardmesh"
TRY_AGAIN_LATER: Final = 1013
"""WebSocket close code (RFC 6455, IANA registry)."""

PAGE_HEADERS: Final = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "font-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asks each time, and hears 304
}
_TYPES: Final = {".js": "text/javascript", ".svg": "image/svg+xml", ".woff2": "font/woff2"}


class StaticFile:
    """One file of the page, read once."""

    def __init__(self, name: str, data: bytes) -> None:
        suffix = name[name.rfind(".") :]
        self.data = data
        self.media_type = _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "text/plain"
        self.tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'

    def answer(self, request: Request) -> Response:
        """The file, or 304 if the asker has it."""
        headers = PAGE_HEADERS | {"ETag": self.tag}
        if request.headers.get("If-None-Match") == self.tag:
            return Response(status_code=304, headers=headers)
        return Response(self.data, media_type=self.media_type, headers=headers)


@functools.cache
def static_files() -> dict[str, StaticFile]:
    """All files of the page by path; what is not here is not served, whatever the path says."""
    found: dict[str, StaticFile] = {}

    def add(folder: Traversable, prefix: str) -> None:
        for entry in folder.iterdir():
            name = f"{prefix}{entry.name}"
            if entry.is_dir():
                add(entry, f"{name}/")
            else:
                found[name] = StaticFile(name, entry.read_bytes())

    add(files("shardmesh.web") / "static", "")
    return found


@page.get("/")
async def index(request: Request) -> Response:
    return static_files()["index.html"].answer(request)


@page.get("/static/{path:path}")
async def static(request: Request, path: str) -> Response:
    found = static_files().get(path)
    return Response(status_code=404) if found is None else found.answer(request)


@page.websocket("/ws")
async def socket(websocket: WebSocket, gateway: GatewayOfApp) -> None:
    """Tells a page of the state of the mesh and of what changes, until it goes away."""
    offered = websocket.scope.get("subprotocols") or []
    await websocket.accept(subprotocol=SOCKET_PROTOCOL if SOCKET_PROTOCOL in offered else None)
    await serve_feed(websocket, gateway.console.feed, dict(gateway.console.about))


async def serve_feed(websocket: WebSocket, feed: Feed, about: dict[str, Any]) -> None:
    """The greeting, then the feed; what the page says is not listened to."""

    async def wait_for_goodbye() -> None:
        while (await websocket.receive())["type"] != "websocket.disconnect":
            pass
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for_goodbye)
        try:
            with feed.subscribe() as news:
                greeting = {"type": "hello", "version": FEED_VERSION, "node": about}
                await websocket.send_text(encode_json(greeting).decode())
                while True:
                    await websocket.send_text((await news.next()).decode())
        except BusyError:
            await websocket.close(TRY_AGAIN_LATER)
        except WebSocketDisconnect:
            pass  # it has gone while something was on its way
        nursery.cancel_scope.cancel()


class KeptEventView(pydantic.BaseModel):
    """An event of the past."""

    id: int
    at_s: float
    kind: str
    cause: str
    data: dict[str, Any]


@router.get("/v1/events/history")
async def events_history(
    gateway: GatewayOfApp,
    before: Annotated[int | None, Query(ge=1, lt=2**53)] = None,
    limit: Annotated[int, Query(ge=1, le=EVENTS_ASKED_MAX)] = 100,
    kind: Annotated[list[str] | None, Query(max_length=16)] = None,
) -> list[KeptEventView]:
    """Events that were kept, the newest first; `before` is the id to go on from.

    `kind` is the beginning of a kind: `node` stands for `node.joined`, `node.left` and so on.
    """
    found = await gateway.console.store.recent(n_max=limit, before_id=before, kinds=kind or ())
    return [KeptEventView(**vars(event)) for event in found]


class ShardToLoad(pydantic.BaseModel):
    """A shard is asked for by model and number."""

    shard_id: Annotated[int, pydantic.Field(ge=0, lt=2**31)]
    model: Annotated[str, pydantic.Field(max_length=128)] | None = None


PeerId = Annotated[str, Path(max_length=128, pattern=r"^\w+$")]


@router.post("/v1/nodes/{peer_id}/shard")
async def load_shard(gateway: GatewayOfApp, peer_id: PeerId, shard: ShardToLoad) -> dict[str, Any]:
    """Has a node load a shard, from its disk or from other nodes; answers once it serves it."""
    _require_known(gateway, peer_id)
    params = LoadShardParams(shard_id=shard.shard_id, model=shard.model)
    answer: dict[str, Any] = await send_command(
        gateway.client.host, peer_id, "LOAD_SHARD", params, LOAD_TIMEOUT_S + COMMAND_TIMEOUT_S
    )
    return answer


@router.delete("/v1/nodes/{peer_id}/shard")
async def unload_shard(gateway: GatewayOfApp, peer_id: PeerId) -> dict[str, Any]:
    """Has a node stop serving its shard; its sessions end."""
    _require_known(gateway, peer_id)
    answer: dict[str, Any] = await send_command(gateway.client.host, peer_id, "UNLOAD_SHARD")
    return answer


def _require_known(gateway: Gateway, peer_id: str) -> None:
    """Raises InputError (theirs) for a node that the mesh does not have."""
    if gateway.directory.get(peer_id) is None:
        raise InputError("the mesh has no node with this peer id", code="UNKNOWN_PEER")
