"""Serves an ASGI application on trio, on one or two ports, until it is cancelled."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Sequence
from typing import Any

import hypercorn
import trio
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app

from shardmesh.errors import InputError
from shardmesh.web.connection import Connection
from shardmesh.wire.limits import (
    HTTP_CONNECTIONS_MAX,
    HTTP_HEADER_BYTES_MAX,
    HTTP_KEEP_ALIVE_S,
    WEBSOCKET_MESSAGE_BYTES_MAX,
)

logger = logging.getLogger(__name__)

_BACKLOG = 256


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; a name counts only if it is `localhost`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind_sockets(host: str, ports: Sequence[int]) -> list[socket.socket]:
    """A listening socket for each port; 0 takes any.

    Raises InputError (theirs) for an address that is not this machine's and for a taken port.
    """
    sockets: list[socket.socket] = []
    try:
        for port in ports:
            sockets.append(_bind(host, port))
    except BaseException:
        for each in sockets:
            each.close()
        raise
    return sockets


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind)
    except OSError as error:
        raise InputError(f"{host} is no address to listen on: {error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise InputError(
            f"cannot listen on {host} port {port}: {error.strerror}",
            code="PORT_IN_USE",
            next_step="choose another one with --port or --ws-port, or --http of a listener",
        ) from error
    return bound


async def serve_app(app: Any, sockets: Sequence[socket.socket]) -> None:
    """Serves until cancelled; takes over the sockets.  Each port serves HTTP and WebSockets."""
    config = _configuration()
    context = WorkerContext(None)
    listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(each)) for each in sockets]
    n_open = 0

    async def serve_one(stream: trio.SocketStream) -> None:
        nonlocal n_open
        if n_open >= HTTP_CONNECTIONS_MAX:
            await trio.aclose_forcefully(stream)
            return
        n_open += 1
        try:
            await Connection(wrapped, config, context, ConnectionState({}), stream)  # type: ignore[arg-type]
        except Exception:
            # One connection's defect must not end the others.
            logger.exception("a connection failed")
        finally:
            n_open -= 1

    wrapped = wrap_app(app, 0, "asgi")
    try:
        await trio.serve_listeners(serve_one, listeners)
    finally:
        await context.terminated.set()


def _configuration() -> hypercorn.Config:
    config = hypercorn.Config()
    config.errorlog = logger
    config.include_server_header = False
    config.keep_alive_timeout = HTTP_KEEP_ALIVE_S
    config.h11_max_incomplete_size = HTTP_HEADER_BYTES_MAX
    config.websocket_max_message_size = WEBSOCKET_MESSAGE_BYTES_MAX
    config.websocket_ping_interval = HTTP_KEEP_ALIVE_S
    return config
