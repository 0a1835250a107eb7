"""A gateway from its start to its end."""

from __future__ import annotations

import dataclasses
import logging
import signal
from collections.abc import Callable

import trio

from shardmesh.confinement import allow_files
from shardmesh.errors import InputError
from shardmesh.settling import settle_memory
from shardmesh.web.app import create_app
from shardmesh.web.gateway import GatewayOptions, open_gateway
from shardmesh.web.guard import Guard, GuardSettings
from shardmesh.web.node_server import node_headers
from shardmesh.web.server import bind_sockets, is_loopback, serve_app

logger = logging.getLogger("shardmesh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WebOptions:
    """What `shardmesh web` is started with."""

    host: str
    port: int
    ws_port: int | None  # None: /ws of the other one alone
    gateway: GatewayOptions
    guard: GuardSettings


async def run_web(options: WebOptions) -> None:
    """Serves until SIGINT, SIGTERM or a cancellation; nothing of it is left then.

    Raises InputError (theirs) for a port that is taken, UnreachableError (the moment's) when no
    bootstrap answers.
    """
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_web, options)
            async for number in signals:
                logger.info("%s: leaving", signal.Signals(number).name)
                nursery.cancel_scope.cancel()
                break


async def serve_web(options: WebOptions, on_ready: Callable[[str], None] | None = None) -> None:
    """Serves until cancelled; `on_ready` is told the address once requests are answered.

    Raises as `run_web` does.
    """
    if not is_loopback(options.host) and not options.guard.tokens:
        raise InputError(
            f"{options.host} can be reached by others, and no API token is set",
            code="NO_API_TOKEN",
            next_step="give --api-token-file, or listen on 127.0.0.1",
        )
    allow_files()
    wanted = [port for port in (options.port, options.ws_port) if port is not None]
    sockets = bind_sockets(options.host, wanted)
    try:
        ports = [int(each.getsockname()[1]) for each in sockets]
        async with open_gateway(options.gateway) as gateway:
            logger.info("Peer ID: %s", gateway.client.host.peer_id)
            logger.info("Name: %s", gateway.node.identity.name)
            url = _url("http", options.host, ports[0])
            logger.info("[WEB] HTTP on %s", url)
            logger.info("[WEB] WebSocket on %s", _url("ws", options.host, ports[-1]))
            settings = dataclasses.replace(options.guard, ports=frozenset(ports))
            app = Guard(create_app(gateway), settings, node_headers(gateway.node))
            settle_memory()
            if on_ready is not None:
                on_ready(url)
            await serve_app(app, sockets)
    finally:
        for each in sockets:
            each.close()


def _url(scheme: str, host: str, port: int) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}:{port}/"
