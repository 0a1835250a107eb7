"""Watching the connections of a host: telling of them, pinging wanted ones, closing idle ones."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from typing import Literal, cast

import trio
from libp2p.abc import INetConn, INetStream, INetwork, INotifee
from libp2p.connection_types import ConnectionType
from libp2p.host.ping import ID as PING_PROTOCOL
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.swarm import Swarm
from libp2p.rcmgr import Direction
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from shardmesh.swarm.pulse import Pulse
from shardmesh.wire.limits import LIVENESS_INTERVAL_S, LIVENESS_NODES_MAX, PING_TIMEOUT_S

_log = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 2.0
_CHECKS_PER_INTERVAL = 10
_HEAD_START = 0.1

OWN_DELAY_S = 1.0
"""A look that comes so late says that this process was held up, and nothing of the others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConnectionEvent:
    """A connection was established or closed; `cause` says why it closed."""

    peer_id: str
    address: str  # of the other side; empty if it is not known any more
    direction: Literal["inbound", "outbound"]
    kind: Literal["established", "closed"]
    cause: str = ""
    was_silent: bool = False  # closed because the node did not answer, though nothing broke


Listener = Callable[[ConnectionEvent], None]


@dataclasses.dataclass
class _Watched:
    event: ConnectionEvent  # how it was established
    pulse: Pulse
    last_used_s: float
    asked_s: float | None = None  # when a sign of life was asked for last
    cause: str = "closed by the other side or lost"
    was_silent: bool = False
    is_closing: bool = False


class ConnectionWatch(INotifee):  # type: ignore[misc,unused-ignore]
    """Knows every connection of a swarm since it was established.

    `wanted` says of a peer id whether its connection is to be kept although nobody uses it.
    """

    def __init__(self, swarm: Swarm, ping_interval_s: float, idle_timeout_s: float) -> None:
        self._swarm = swarm
        self._ping_s = ping_interval_s
        self._idle_timeout_s = idle_timeout_s
        self._watched: dict[INetConn, _Watched] = {}
        self._listeners: list[Listener] = []
        self.wanted: Callable[[str], bool] = lambda peer_id: False
        swarm.register_notifee(self)

    def listen_to_events(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def addresses_of(self, peer_id: str) -> list[str]:
        """The addresses of the other side, of all live connections with a node."""
        events = [watched.event for watched in self._watched.values()]
        return [event.address for event in events if event.peer_id == peer_id and event.address]

    def peer_at(self, address: str) -> str | None:
        """The node that was dialed at this address, which has no peer id, and is still there."""
        for watched in self._watched.values():
            event = watched.event
            if event.direction == "outbound" and event.address == address:
                return None if watched.is_closing else event.peer_id
        return None

    async def close(self, conns: Iterable[INetConn], cause: str) -> None:
        """Closes connections within two seconds, however the other side behaves."""
        async with trio.open_nursery() as nursery:
            for conn in conns:
                nursery.start_soon(self._close, conn, cause)

    async def run(self) -> None:
        """Pings and closes for ever."""
        shortest_s = min(self._ping_s, self._idle_timeout_s, LIVENESS_INTERVAL_S)
        async with trio.open_nursery() as nursery:
            while True:
                now_s = trio.current_time()
                steps = [self._step(*each, now_s, nursery) for each in self._watched.items()]
                # Who is new, or wanted since a moment ago, has a turn after the shortest time.
                pause_s = min(steps, default=math.inf) - now_s
                pause_s = min(max(pause_s, shortest_s / _CHECKS_PER_INTERVAL), shortest_s)
                await trio.sleep(pause_s)
                if trio.current_time() - now_s > pause_s + OWN_DELAY_S:
                    self._forget_questions()

    def _step(
        self, conn: INetConn, watched: _Watched, now_s: float, nursery: trio.Nursery
    ) -> float:
        """Does what a connection needs now, and says when to look at it again."""
        if _in_use(conn):
            watched.last_used_s = now_s
        wanted = self.wanted(watched.event.peer_id)
        idle_at_s = math.inf if wanted else watched.last_used_s + self._idle_timeout_s
        heard_s, asked_s = watched.pulse.heard_s, watched.asked_s
        if watched.is_closing:
            return math.inf
        if now_s >= idle_at_s:
            return self._start_closing(conn, f"idle for {self._idle_timeout_s:g} s", nursery)
        if asked_s is not None and heard_s < asked_s:
            if now_s >= asked_s + PING_TIMEOUT_S:
                watched.was_silent = True
                cause = f"no answer to a ping within {PING_TIMEOUT_S:g} s"
                return self._start_closing(conn, cause, nursery)
            return min(asked_s + PING_TIMEOUT_S, idle_at_s)
        due_s = heard_s + self._patience_s(watched, wanted=wanted)
        if now_s < due_s:
            return min(due_s, idle_at_s)
        watched.asked_s = now_s
        nursery.start_soon(watched.pulse.ask)
        return min(now_s + PING_TIMEOUT_S, idle_at_s)

    def _start_closing(self, conn: INetConn, cause: str, nursery: trio.Nursery) -> float:
        self._watched[conn].is_closing = True
        nursery.start_soon(self._close, conn, cause)
        return math.inf

    def _forget_questions(self) -> None:
        """This process was held up itself: answers may lie there that it has not read yet."""
        for watched in self._watched.values():
            watched.asked_s = None

    async def _close(self, conn: INetConn, cause: str) -> None:
        watched = self._watched.get(conn)
        if watched is None:
            return
        watched.cause = cause
        with trio.move_on_after(0 if watched.was_silent else _CLOSE_TIMEOUT_S) as scope:
            await conn.close()
        if scope.cancelled_caught:  # the other side takes nothing any more: cut the line
            with trio.move_on_after(_CLOSE_TIMEOUT_S):
                await cast(Yamux, conn.muxed_conn).secured_conn.close()
            # Else the library, whose own closing was cut short, would have it stand in the way of a
            # new connection for ever.
            self._swarm.remove_conn(cast(SwarmConn, conn))
            await self.disconnected(self._swarm, conn)
        watched.is_closing = False  # should it still be there

    def _patience_s(self, watched: _Watched, *, wanted: bool) -> float:
        """How long a connection may be quiet until it is pinged.

        The node that has dialed is a little quicker: its ping tells the other one as much.
        """
        n_times = max(1.0, len(self._watched) / LIVENESS_NODES_MAX) if wanted else math.inf
        quiet_s = min(LIVENESS_INTERVAL_S * n_times, self._ping_s)
        return quiet_s * (1 + _HEAD_START if watched.event.direction == "inbound" else 1)

    def _tell(self, event: ConnectionEvent) -> None:
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:  # noqa: BLE001 - a listener's defect must not end a connection
                _log.exception("a listener to connection events failed")

    # -- called by the swarm -------------------------------------------------------------------

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        now_s = trio.current_time()
        inbound = cast(SwarmConn, conn).direction == Direction.INBOUND
        event = ConnectionEvent(
            peer_id=str(conn.muxed_conn.peer_id),
            address=_remote_address(conn),
            direction="inbound" if inbound else "outbound",
            kind="established",
        )
        pulse = Pulse(cast(Yamux, conn.muxed_conn))
        self._watched[conn] = _Watched(event, pulse, last_used_s=now_s)
        self._tell(event)
        await trio.lowlevel.checkpoint()

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        watched = self._watched.pop(conn, None)
        if watched is not None:
            self._tell(_closed(watched))
        await trio.lowlevel.checkpoint()

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        conn = getattr(stream, "swarm_conn", None)
        if conn in self._watched and stream.get_protocol() != PING_PROTOCOL:
            self._watched[conn].last_used_s = trio.current_time()
        await trio.lowlevel.checkpoint()

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        await trio.lowlevel.checkpoint()

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        await trio.lowlevel.checkpoint()

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        await trio.lowlevel.checkpoint()


def _closed(watched: _Watched) -> ConnectionEvent:
    return dataclasses.replace(
        watched.event, kind="closed", cause=watched.cause, was_silent=watched.was_silent
    )


def _in_use(conn: INetConn) -> bool:
    """Whether a stream other than a ping is open."""
    return any(stream.get_protocol() not in (None, PING_PROTOCOL) for stream in conn.get_streams())


def is_relayed(conn: INetConn) -> bool:
    """Whether a relay carries the connection."""
    return conn.get_connection_type() == ConnectionType.RELAYED


def remote_host(conn: INetConn) -> str | None:
    """The IP address that the other side is seen at; None for one that comes through a relay."""
    if is_relayed(conn):
        return None
    remote = cast(Yamux, conn.muxed_conn).get_remote_address()
    return remote[0] if remote is not None else None


def _remote_address(conn: INetConn) -> str:
    if is_relayed(conn):
        return str(next(iter(conn.get_transport_addresses()), ""))
    host = remote_host(conn)
    remote = cast(Yamux, conn.muxed_conn).get_remote_address()
    if host is None or remote is None:
        return ""
    return f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{remote[1]}"
