"""A gateway from its start to its end."""

from __future__ import annotations

import dataclasses
import logging
import signal

import trio

from shardmesh.web.app import create_app
from shardmesh.web.gateway import GatewayOptions, open_gateway
from shardmesh.web.server import bind_sockets, serve_app

logger = logging.getLogger("shardmesh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WebOptions:
    """What `shardmesh web` is started with."""

    host: str
    port: int
    ws_port: int
    gateway: GatewayOptions


async def run_web(options: WebOptions) -> None:
    """Serves until SIGINT, SIGTERM or a cancellation; nothing of it is left then.

    Raises InputError (theirs) for a port that is taken, UnreachableError (the moment's) when no
    bootstrap answers.
    """
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve, options)
            async for number in signals:
                logger.info("%s: leaving", signal.Signals(number).name)
                nursery.cancel_scope.cancel()
                break


async def _serve(options: WebOptions) -> None:
    sockets = bind_sockets(options.host, [options.port, options.ws_port])
    try:
        async with open_gateway(options.gateway) as gateway:
            logger.info("Peer ID: %s", gateway.client.host.peer_id)
            for name, each in zip(("HTTP", "WebSocket"), sockets, strict=True):
                scheme = "http" if name == "HTTP" else "ws"
                logger.info("[WEB] %s on %s", name, _url(scheme, options.host, each.getsockname()))
            await serve_app(create_app(gateway), sockets)
    finally:
        for each in sockets:
            each.close()


def _url(scheme: str, host: str, name: tuple[object, ...]) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}:{name[1]}/"
