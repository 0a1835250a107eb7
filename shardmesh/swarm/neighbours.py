"""Staying connected: with the bootstraps, with remembered nodes, with the other listeners."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from shardmesh.errors import RefusedError, ShardmeshError, UnreachableError
from shardmesh.swarm.addresses import parse_address, with_peer_id
from shardmesh.swarm.directory import Directory
from shardmesh.swarm.host import ConnectionEvent, Host
from shardmesh.swarm.lan import is_default
from shardmesh.swarm.remembered import RememberedNode, RememberedNodes
from shardmesh.wire.announcement import Announcement
from shardmesh.wire.limits import (
    BOOTSTRAP_PAUSE_MAX_S,
    BOOTSTRAP_PAUSE_MIN_S,
    COMMAND_TIMEOUT_S,
    DIRECT_CONNECTIONS_MAX,
)

Connected = Callable[[str], Awaitable[None]]
"""What is to be done with a node that a connection was just established with."""

_DIALS_AT_ONCE = 8
_RECHECK_PAUSES_S = (0.0, 0.5, 1.5)
_REMEMBERED_TIMEOUT_S = 3.0
_RECHECK_PAUSE_MAX_S = 3.0  # a partition may end at any time, and 10 s later all know each other
_RECHECK_S = 4.0  # a listener that was killed is hidden by then, whatever its addresses do
_POLITE_PAUSE_S = 1.0  # of two nodes that learn of each other at once, one lets the other dial


def pauses_s(
    longest_s: float = BOOTSTRAP_PAUSE_MAX_S, jitter: Callable[[], float] = random.random
) -> Iterable[float]:
    """Growing pauses between attempts: doubled each time, bounded, 75 to 125 % of that."""
    pause_s = BOOTSTRAP_PAUSE_MIN_S
    while True:
        yield pause_s * (0.75 + jitter() / 2)
        pause_s = min(2 * pause_s, longest_s)


def failure_level(bootstraps: Sequence[str], connected: Sequence[str]) -> int:
    """How loudly to tell of a bootstrap without an answer: hardly, if others were found and nobody
    has named it."""
    return logging.DEBUG if connected and is_default(bootstraps) else logging.WARNING


class Neighbours:
    """The connections that a node wants, dialed and watched."""

    def __init__(
        self,
        host: Host,
        directory: Directory,
        *,
        bootstraps: Sequence[str],
        remembered: RememberedNodes,
        logger: logging.Logger,
    ) -> None:
        """Raises InputError (theirs) for a bootstrap that is no address."""
        for address in bootstraps:
            parse_address(address)
        self._host = host
        self._directory = directory
        self._bootstraps = bootstraps
        self._remembered = remembered
        self._log = logger
        self._bootstrap_ids: set[str] = set()
        self._refused: set[str] = set()  # bootstraps that did not admit this node
        self._closed = trio.Event()
        self._lost: list[str] = []
        self._has_joined = False
        self._rechecked: set[str] = set()
        self._met: set[str] = set()  # connected listeners that were told of this node
        host.keep_connections(self.is_wanted)
        host.on_connection(self._note)

    def note_bootstrap(self, peer_id: str) -> None:
        """Wants the connection with this node as with a bootstrap that was named."""
        self._bootstrap_ids.add(peer_id)

    def connected_bootstraps(self) -> list[str]:
        return [peer_id for peer_id in self._host.connected() if peer_id in self._bootstrap_ids]

    def connected_listeners(self) -> list[str]:
        known = {announcement.peer_id for announcement in self._directory.all()}
        return [peer_id for peer_id in self._host.connected() if peer_id in known]

    def is_wanted(self, peer_id: str) -> bool:
        """Whether it is a bootstrap of this node or a listener of the directory."""
        return peer_id in self._bootstrap_ids or self._directory.get(peer_id) is not None

    # -- bootstraps ----------------------------------------------------------------------------

    async def stay_with_bootstraps(self, connected: Connected) -> None:
        """Dials each bootstrap, again whenever it is lost, for ever.

        Raises RefusedError (theirs) if all of them refuse this node before one has admitted it.
        """
        async with trio.open_nursery() as nursery:
            for address in self._bootstraps:
                nursery.start_soon(self._stay_with, address, connected)

    async def _stay_with(self, address: str, connected: Connected) -> None:
        pauses = iter(pauses_s())
        while True:
            self._log.info("🔗 Connecting to bootstrap node... %s", address)
            try:
                peer_id = await self._host.connect([address], COMMAND_TIMEOUT_S)
            except ShardmeshError as error:
                if isinstance(error, RefusedError):
                    self._refused.add(address)
                    if not self._bootstrap_ids and self._refused >= set(self._bootstraps):
                        raise
                pause_s = next(pauses)
                self._log.log(
                    failure_level(self._bootstraps, self._host.connected()),
                    "[CONNECT] ✗ Bootstrap node %s, trying again in %.0f s: %s",
                    "refuses" if isinstance(error, RefusedError) else "not reachable",
                    pause_s,
                    error,
                )
                await self._join_through_others(connected)
                await trio.sleep(pause_s)
                continue
            pauses = iter(pauses_s())
            self._bootstrap_ids.add(peer_id)
            self._remembered.note(peer_id, (with_peer_id(address, peer_id),))
            self._has_joined = True
            await connected(peer_id)
            while peer_id in self._host.connected():
                await self._closed.wait()
            self._log.warning("[CONNECT] ✗ Connection to the bootstrap node lost")

    async def reach(self, timeout_s: float) -> str:
        """See Membership.reach."""
        has_others = any(node.addresses for node in self._remembered.nodes())
        try:
            return await self._host.connect(
                self._bootstraps, timeout_s / 2 if has_others else timeout_s
            )
        except UnreachableError:
            peer_id = await self._reach_remembered() if has_others else None
            if peer_id is None:
                raise
            return peer_id

    async def _join_through_others(self, connected: Connected) -> None:
        """Without a bootstrap: joins through a node that is connected or remembered."""
        peer_ids = self._host.connected()
        if peer_ids and self._has_joined:
            return
        peer_id = peer_ids[0] if peer_ids else await self._reach_remembered()
        if peer_id is not None:
            self._has_joined = True
            await connected(peer_id)

    async def _reach_remembered(self) -> str | None:
        """Dials nodes of earlier runs, several at once; the first that answers will do."""
        found: list[str] = []
        limiter = trio.CapacityLimiter(_DIALS_AT_ONCE)

        async def dial(node: RememberedNode) -> None:
            async with limiter:
                try:
                    found.append(await self._host.connect(node.addresses, _REMEMBERED_TIMEOUT_S))
                except ShardmeshError:
                    return
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for node in self._remembered.nodes():
                if node.peer_id != self._host.peer_id and node.addresses:
                    nursery.start_soon(dial, node)
        if not found:
            return None
        self._log.info("[CONNECT] ✓ Joined through a remembered node: %s", found[0])
        return found[0]

    # -- listeners -----------------------------------------------------------------------------

    async def stay_with_listeners(self, connected: Connected) -> None:
        """Connects with each listener that the directory learns of, for ever."""
        version = -1
        tried: dict[str, int] = {}  # peer id -> sequence of the announcement that was tried
        limiter = trio.CapacityLimiter(_DIALS_AT_ONCE)
        async with trio.open_nursery() as nursery:
            while True:
                version = await self._directory.wait_changed(version)
                for announcement in self._directory.all():
                    peer_id = announcement.peer_id
                    if peer_id == self._host.peer_id or tried.get(peer_id) == announcement.sequence:
                        continue
                    tried[peer_id] = announcement.sequence
                    self._host.learn(peer_id, announcement.addresses)
                    if peer_id not in self._met:  # else it only says how busy it is
                        nursery.start_soon(self._meet, announcement, connected, limiter)

    async def _meet(
        self, announcement: Announcement, connected: Connected, limiter: trio.CapacityLimiter
    ) -> None:
        peer_id = announcement.peer_id
        if self._host.peer_id > peer_id:
            await trio.sleep(_POLITE_PAUSE_S)
        if peer_id not in self._host.connected():
            if len(self.connected_listeners()) >= DIRECT_CONNECTIONS_MAX:
                return
            async with limiter:
                try:
                    await self._host.connect(announcement.addresses, COMMAND_TIMEOUT_S)
                except ShardmeshError as error:
                    self._log.info("[CONNECT] ✗ Listener not reachable: %s", error)
                    self._directory.mark_unreachable(peer_id)
                    return
        self._remembered.note(peer_id, announcement.addresses)
        if peer_id not in self._met:  # by an announcement that came meanwhile
            self._met.add(peer_id)
            await connected(peer_id)

    # -- what happens to connections -----------------------------------------------------------

    def _note(self, event: ConnectionEvent) -> None:
        if event.kind == "established":
            self._log.info(
                "[CONNECT] ✓ Connection established! %s (%s, %s)",
                event.peer_id,
                event.direction,
                event.address,
            )
            self._directory.mark_reachable(event.peer_id)
            return
        self._log.info(
            "[CONNECT] ✗ Connection closed: %s (%s): %s",
            event.peer_id,
            event.direction,
            event.cause,
        )
        if event.peer_id not in self._host.connected():
            self._met.discard(event.peer_id)
            self._note_lost(event)
        self._closed.set()
        self._closed = trio.Event()

    def _note_lost(self, event: ConnectionEvent) -> None:
        if self._listed(event.peer_id) is not None:
            self._lost.append(event.peer_id)
            if event.was_silent:  # it may take minutes to refuse a connection: hidden until then
                self._directory.mark_unreachable(event.peer_id)

    def doubt(self, peer_ids: Iterable[str]) -> None:
        """Has listeners dialed that may be gone, unless there is a connection with them."""
        connected = {self._host.peer_id, *self._host.connected()}
        self._lost += [peer_id for peer_id in peer_ids if peer_id not in connected]
        if self._lost:
            self._closed.set()
            self._closed = trio.Event()

    async def check(self, peer_ids: Iterable[str]) -> None:
        """Dials listeners without a connection now, and hides those that are gone.

        Who waits for this waits for seconds; those that are hidden are looked for later.
        """
        connected = {self._host.peer_id, *self._host.connected()}
        gone: list[str] = []

        async def look_for(peer_id: str) -> None:
            with trio.move_on_after(_RECHECK_S):
                if await self._is_back(peer_id, _RECHECK_PAUSES_S):
                    return
            self._hide(peer_id)
            gone.append(peer_id)

        async with trio.open_nursery() as nursery:
            for peer_id in set(peer_ids) - connected - self._rechecked:
                nursery.start_soon(look_for, peer_id)
        self.doubt(gone)

    async def recheck_lost(self) -> None:
        """Dials listeners whose connection was lost, and hides those that are gone, for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                lost, self._lost = set(self._lost), []
                for peer_id in lost:
                    nursery.start_soon(self._recheck, peer_id)
                if not self._lost:
                    await self._closed.wait()

    async def _recheck(self, peer_id: str) -> None:
        if peer_id in self._rechecked:
            return
        self._rechecked.add(peer_id)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hide_soon, peer_id)
                if not await self._is_back(peer_id, _RECHECK_PAUSES_S):
                    self._hide(peer_id)
                    # It may have been busy or cut off, and says nothing new.
                    await self._is_back(peer_id, pauses_s(_RECHECK_PAUSE_MAX_S))
                nursery.cancel_scope.cancel()
        finally:
            self._rechecked.discard(peer_id)

    async def _hide_soon(self, peer_id: str) -> None:
        """A dial that is under way goes on: over a bad line it may be about to get through."""
        await trio.sleep(_RECHECK_S)
        self._hide(peer_id)

    def _hide(self, peer_id: str) -> None:
        """Unless it has connected by itself meanwhile."""
        if self._directory.get(peer_id) is not None and peer_id not in self._host.connected():
            self._log.info("[CONNECT] ✗ Listener gone: %s", peer_id)
            self._directory.mark_unreachable(peer_id)

    async def _is_back(self, peer_id: str, pauses_s: Iterable[float]) -> bool:
        """Whether a listener needs not be hidden: it could be dialed, or is forgotten already."""
        for pause_s in pauses_s:
            await trio.sleep(pause_s)
            announcement = self._listed(peer_id)
            if announcement is None:
                return True
            if peer_id not in self._host.connected():
                try:
                    await self._host.connect(announcement.addresses, COMMAND_TIMEOUT_S)
                except ShardmeshError:
                    continue
            self._directory.mark_reachable(peer_id)
            return True
        return False

    def _listed(self, peer_id: str) -> Announcement | None:
        """What a listener says of itself, be it hidden or not."""
        return self._directory.get(peer_id) or self._directory.hidden(peer_id)
