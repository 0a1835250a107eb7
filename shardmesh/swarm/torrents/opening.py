"""Starting libtorrent on a port that is told to others, and ending it."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import libtorrent as lt
import trio

from shardmesh.errors import InputError, carried_past
from shardmesh.swarm.torrents.gate import Gate
from shardmesh.swarm.torrents.session import TorrentSession
from shardmesh.swarm.torrents.settings import limit_all_addresses, session_settings

_CLOSE_TIMEOUT_S: Final = 1.5
_PORT_ATTEMPTS: Final = 5  # somebody else may be quicker to take the port that was free


@asynccontextmanager
async def open_torrents(
    *,
    listen_hosts: Sequence[str],
    port: int = 0,
    upload_rate_bytes_per_s: int = 0,
    download_rate_bytes_per_s: int = 0,
    members_only: bool = False,
) -> AsyncIterator[TorrentSession]:
    """A session that listens until the block is left; rates in bytes per second, 0 for no limit.

    With `members_only` it refuses connections with addresses that were not admitted.
    Raises InputError (theirs, PORT_TAKEN) if it cannot listen.
    """
    session, own_port = await trio.to_thread.run_sync(
        _start, listen_hosts, port, upload_rate_bytes_per_s, download_rate_bytes_per_s
    )
    sessions = [session]
    torrents = TorrentSession(session, own_port, Gate() if members_only else None)
    here, there = socket.socketpair()
    try:
        if not own_port:
            raise InputError(
                f"port {port} on {', '.join(listen_hosts)} is not free for torrents",
                code="PORT_TAKEN",
                next_step="end the process that uses it, or choose another with --torrent-port",
            )
        there.setblocking(False)
        here.setblocking(False)
        session.set_alert_fd(there.fileno())
        with carried_past() as block:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(torrents.run, trio.socket.from_stdlib_socket(here))
                try:
                    with block():
                        yield torrents
                finally:
                    torrents.stop()
    finally:
        session.set_alert_fd(-1)
        torrents.forget_session()
        del session  # what is left in `sessions` is the last reference: closing blocks
        with trio.CancelScope(shield=True), trio.move_on_after(_CLOSE_TIMEOUT_S):
            await trio.to_thread.run_sync(sessions.clear, abandon_on_cancel=True)  # type: ignore[call-arg]
        here.close()
        there.close()


def _start(
    listen_hosts: Sequence[str],
    port: int,
    upload_rate_bytes_per_s: int,
    download_rate_bytes_per_s: int,
) -> tuple[lt.session, int]:
    """A session, and the port that it listens on, 0 if it could not."""
    for _ in range(_PORT_ATTEMPTS):
        chosen = port or _free_port(listen_hosts)
        settings = session_settings(
            listen_hosts,
            chosen,
            upload_rate_bytes_per_s=upload_rate_bytes_per_s,
            download_rate_bytes_per_s=download_rate_bytes_per_s,
        )
        session: lt.session = lt.session(settings)  # type: ignore[call-overload]
        limit_all_addresses(session)
        if port or (chosen and session.is_listening()):
            break
    return session, chosen if session.is_listening() else 0


def _free_port(hosts: Sequence[str]) -> int:
    """A port for all addresses of the machine; libtorrent would choose one for each of them.

    0 if a host is no address of this machine, or somebody else has the port there.
    """
    port = 0
    for host in hosts:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            if ":" in host:  # else :: is all addresses of IPv4 as well
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind((host, port))
            except OSError:
                return 0
            port = int(probe.getsockname()[1])
    return port
