"""A gateway from its start to its end."""

from __future__ import annotations

import dataclasses
import logging
import signal

import trio

from shardmesh.errors import InputError
from shardmesh.web.app import create_app
from shardmesh.web.gateway import GatewayOptions, open_gateway
from shardmesh.web.guard import Guard, GuardSettings
from shardmesh.web.server import bind_sockets, is_loopback, serve_app

logger = logging.getLogger("shardmesh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WebOptions:
    """What `shardmesh web` is started with."""

    host: str
    port: int
    ws_port: int
    gateway: GatewayOptions
    guard: GuardSettings


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
    if not is_loopback(options.host) and not options.guard.tokens:
        raise InputError(
            f"{options.host} can be reached by others, and no API token is set",
            code="NO_API_TOKEN",
            next_step="give --api-token-file, or listen on 127.0.0.1",
        )
    sockets = bind_sockets(options.host, [options.port, options.ws_port])
    try:
        async with open_gateway(options.gateway) as gateway:
            logger.info("Peer ID: %s", gateway.client.host.peer_id)
            for name, each in zip(("HTTP", "WebSocket"), sockets, strict=True):
                scheme = "http" if name == "HTTP" else "ws"
                logger.info("[WEB] %s on %s", name, _url(scheme, options.host, each.getsockname()))
            ports = frozenset(int(each.getsockname()[1]) for each in sockets)
            settings = dataclasses.replace(options.guard, ports=ports)
            headers = {"X-Node-ID": gateway.client.host.peer_id}
            await serve_app(Guard(create_app(gateway), settings, headers), sockets)
    finally:
        for each in sockets:
            each.close()


def _url(scheme: str, host: str, name: tuple[object, ...]) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}:{name[1]}/"
