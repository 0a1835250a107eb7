"""What a node does on the network: joins, announces itself, keeps knowing the others, leaves.

NODE_JOIN's steps 7 to 11 and its chapter on connections; the lines in the log keep their tags.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import trio

from shardmesh.errors import InputError, ShardmeshError
from shardmesh.swarm.announcing import Announcer, Offer, Teller
from shardmesh.swarm.cluster import ClusterUpdates
from shardmesh.swarm.dht import Dht
from shardmesh.swarm.directory import Directory, exchange, serve_directory
from shardmesh.swarm.directory_news import follow_directory, serve_directory_news
from shardmesh.swarm.host import Host
from shardmesh.swarm.neighbours import Neighbours
from shardmesh.swarm.remembered import RememberedNodes
from shardmesh.wire.announcement import Announcement
from shardmesh.wire.envelope import Signer
from shardmesh.wire.limits import (
    ANNOUNCEMENT_LIFETIME_MAX_S,
    DIRECTORY_FOLLOW_PAUSE_S,
    DIRECTORY_PULL_INTERVAL_S,
)

_LEAVE_TIMEOUT_S = 1.0
_LOOK_UPS_AT_ONCE = 16


class TaskStatus(Protocol):
    """What `nursery.start` gives to a task."""

    def started(self) -> None: ...


class Membership:
    """A node's place in the mesh.

    With an `offer` it is a listener: it announces what `offer()` gives and connects with the other
    listeners.  Without, it only watches: a bootstrap or a client.
    """

    def __init__(
        self,
        host: Host,
        dht: Dht,
        directory: Directory,
        *,
        bootstraps: Sequence[str],
        signer: Signer,
        offer: Callable[[], Offer] | None = None,
        refresh_interval_s: float = 300,
        state_dir: Path | None = None,
        logger: logging.Logger | None = None,
    ) -> None:
        """Raises InputError (theirs) for a bootstrap that is no address or too long an interval.

        Nodes are remembered between runs in the files of the cluster, else in `state_dir`.
        """
        if not 0 < refresh_interval_s < ANNOUNCEMENT_LIFETIME_MAX_S:
            raise InputError(
                f"a refresh interval of {refresh_interval_s:g} s",
                next_step=f"Give more than 0 and less than {ANNOUNCEMENT_LIFETIME_MAX_S} s.",
            )
        self.joined = trio.Event()
        """Set once a first other node was reached and asked."""
        self._host = host
        self._dht = dht
        self._directory = directory
        self._log = logger or logging.getLogger(__name__)
        files = host.admission.files
        path = files.nodes_path if files else state_dir and state_dir / "nodes.json"
        self._remembered = RememberedNodes(path)
        self._neighbours = Neighbours(
            host,
            directory,
            bootstraps=bootstraps,
            remembered=self._remembered,
            logger=self._log,
        )
        self._teller = Teller(self._told_neighbours, self._tell_neighbour)
        self._announcer: Announcer | None = None
        if offer is not None:
            self._announcer = Announcer(
                host,
                dht,
                directory,
                offer,
                signer=signer,
                teller=self._teller,
                refresh_interval_s=refresh_interval_s,
                logger=self._log,
            )
        self._is_following = False  # a neighbour tells of each change, so that nobody is asked
        self.announced = self._announcer.announced if self._announcer else trio.Event()
        """Set once a first announcement reached the DHT; never without an offer."""
        self.updates = ClusterUpdates(
            host, directory, self._log, is_node=self._neighbours.is_wanted
        )
        serve_directory(host, directory)
        serve_directory_news(host, directory)
        dht.on_routing_updated(lambda peer_id: self._log.info("[DHT] Routing updated: %s", peer_id))

    async def run(self, *, task_status: TaskStatus = trio.TASK_STATUS_IGNORED) -> None:
        """Takes part until cancelled; then says farewell within a second, and writes a file."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.updates.run)
                nursery.start_soon(self._neighbours.recheck_lost)
                nursery.start_soon(self._neighbours.stay_with_bootstraps, self._join_through)
                nursery.start_soon(self._keep_pulling)
                nursery.start_soon(self._route_through_listeners)
                if self._announcer is not None:
                    nursery.start_soon(self._neighbours.stay_with_listeners, self._greet)
                    nursery.start_soon(self._keep_announcing, self._announcer)
                task_status.started()
        finally:
            with trio.CancelScope(shield=True):
                with trio.move_on_after(_LEAVE_TIMEOUT_S):
                    await self._leave()
                await self._save_remembered()  # behind the farewell: a disk can be slow

    def neighbours(self) -> list[str]:
        """The connected bootstraps, then the connected listeners in any order."""
        listeners = self._neighbours.connected_listeners()
        random.shuffle(listeners)
        return list(dict.fromkeys([*self._neighbours.connected_bootstraps(), *listeners]))

    def announce_changed(self) -> None:
        """What `offer()` gives has changed: announce it now."""
        if self._announcer is not None:
            self._announcer.change(is_load=False)

    def announce_load(self) -> None:
        """Only the load in `offer()` has changed: tell the neighbours, not the DHT."""
        if self._announcer is not None:
            self._announcer.change(is_load=True)

    async def find_listeners(self, total_shards: int | None = None) -> list[Announcement]:
        """Who serves what: from the directory, and from the DHT for shards that it lacks.

        Without `total_shards` the number is taken from what is found.  Raises UnreachableError
        (the moment's) if the DHT does not answer.
        """
        found = self._directory.all()
        wanted = total_shards or max((a.total_shards for a in found), default=0)
        if not wanted:
            await self._ask_dht(0)
            found = self._directory.all()
            wanted = max((a.total_shards for a in found), default=0)
        missing = sorted(set(range(wanted)) - {a.shard_id for a in found})
        async with trio.open_nursery() as nursery:
            for shard_id in missing[:_LOOK_UPS_AT_ONCE]:
                nursery.start_soon(self._ask_dht, shard_id)
        if missing:
            found = self._directory.all()
        for announcement in found:
            if announcement.peer_id != self._host.peer_id:
                self._host.learn(announcement.peer_id, announcement.addresses)
        return found

    def n_announcements_refused(self) -> dict[str, int]:
        """Announcements of neighbours that were not believed, by error code."""
        return dict(self._directory.n_refused)

    def known_listeners(self) -> list[Announcement]:
        """Who serves what, as far as is known without asking anybody."""
        return self._directory.all()

    async def pull(self) -> None:
        """Asks one neighbour for its directory now; without an answer all stays as it is."""
        if (peer_id := self._some_neighbour()) is not None:
            try:
                await self._tell(peer_id, pull=True)
            except ShardmeshError as error:
                self._log.debug("a neighbour's directory could not be had: %s", error)

    async def follow(self) -> None:
        """Has one neighbour tell of each change in its directory, for ever."""
        while True:
            if (peer_id := self._some_neighbour()) is not None:
                try:
                    self._is_following = True
                    await follow_directory(
                        self._host, self._directory, peer_id, self._neighbours.doubt
                    )
                except ShardmeshError as error:
                    self._log.debug("%s tells no news: %s", peer_id, error)
                finally:
                    self._is_following = False
            await trio.sleep(DIRECTORY_FOLLOW_PAUSE_S)

    def _some_neighbour(self) -> str | None:
        """A bootstrap if there is one: all listeners tell it of themselves."""
        neighbours = (
            self._neighbours.connected_bootstraps() or self._neighbours.connected_listeners()
        )
        return random.choice(neighbours) if neighbours else None

    async def _ask_dht(self, shard_id: int) -> None:
        try:
            for signed in await self._dht.find_announcements(shard_id):
                self._directory.update(signed)
            served = [a.peer_id for a in self._directory.all() if a.shard_id == shard_id]
            await self._neighbours.check(served)  # what the DHT says may be minutes old
        except ShardmeshError as error:
            self._log.warning("[DHT] ✗ Shard %d could not be looked up: %s", shard_id, error)

    # -- joining -------------------------------------------------------------------------------

    async def join_through(self, peer_id: str) -> None:
        """Treats a connected node, found by chance, as a bootstrap for as long as it is there."""
        self._neighbours.note_bootstrap(peer_id)
        await self._join_through(peer_id)

    async def _join_through(self, peer_id: str) -> None:
        """Comes to know the mesh through a node that was just reached."""
        self._log.info("[DHT] ✓ Started Kademlia bootstrap")
        try:
            await self._dht.add(peer_id)
            await self._tell(peer_id, pull=True)
            await self._dht.refresh()
        except ShardmeshError as error:
            self._log.warning("[DHT] ✗ %s", error)
        self.joined.set()
        self.announce_changed()  # whoever was away does not know us any more

    async def _greet(self, peer_id: str) -> None:
        """Tells a listener that was just met of us and puts it into the routing table."""
        try:
            await self._dht.add(peer_id)
            await self._tell(peer_id, pull=False)
        except ShardmeshError as error:
            self._log.info("[CONNECT] ✗ %s could not be told of this node: %s", peer_id, error)

    async def _route_through_listeners(self) -> None:
        """Puts whoever connects and announces itself into the routing table.

        A bootstrap meets nobody by itself, but who joins through it announces anew afterwards.
        """
        version = -1
        while True:
            version = await self._directory.wait_changed(version)
            connected = set(self._host.connected())
            for announcement in self._directory.all():
                if announcement.peer_id in connected:
                    self._host.learn(announcement.peer_id, announcement.addresses)
                    await self._dht.add(announcement.peer_id)

    async def _keep_pulling(self) -> None:
        while True:
            await trio.sleep(DIRECTORY_PULL_INTERVAL_S * random.uniform(0.8, 1.2))
            if not self._is_following:
                await self.pull()
            await self._save_remembered()

    async def _keep_announcing(self, announcer: Announcer) -> None:
        await self.joined.wait()
        await announcer.run()

    async def reach(self, timeout_s: float) -> str:
        """Connects with a bootstrap, or with a remembered node if none answers; its peer id.

        Raises UnreachableError (the moment's) or RefusedError (theirs), as the bootstraps say.
        """
        return await self._neighbours.reach(timeout_s)

    async def _save_remembered(self) -> None:
        for announcement in self._directory.all():
            if announcement.peer_id != self._host.peer_id and announcement.addresses:
                self._remembered.note(announcement.peer_id, announcement.addresses)
        try:
            await trio.to_thread.run_sync(self._remembered.save)
        except ShardmeshError as error:
            self._log.warning("the known nodes could not be remembered: %s", error)

    # -- telling -------------------------------------------------------------------------------

    def _told_neighbours(self) -> set[str]:
        bootstraps = self._neighbours.connected_bootstraps()
        return {*bootstraps, *self._neighbours.connected_listeners()} - {self._host.peer_id}

    async def _tell_neighbour(self, peer_id: str) -> None:
        """Tells a neighbour of us; who does not answer hears of it by pulling."""
        bootstraps = self._neighbours.connected_bootstraps()
        try:
            # of two that announce at once, the later one learns of the earlier one here
            await self._tell(peer_id, pull=peer_id in bootstraps or not bootstraps)
        except ShardmeshError as error:
            self._log.debug("%s could not be told of this node: %s", peer_id, error)

    async def _tell(self, peer_id: str, *, pull: bool) -> None:
        """Hands our announcement to a neighbour and, with `pull`, takes in what it knows."""
        signed = self._announcer.signed if self._announcer is not None else None
        push = () if signed is None else (signed,)
        if push or pull:
            doubtful = await exchange(self._host, self._directory, peer_id, push=push, pull=pull)
            self._neighbours.doubt(doubtful)

    async def _leave(self) -> None:
        """Takes the announcement back."""
        if self._announcer is None or self._announcer.signed is None:
            return
        signed = self._announcer.sign(0)
        await self._teller.tell_all()
        self._directory.update(signed)
        try:
            await self._dht.withdraw(signed)
        except ShardmeshError as error:
            self._log.debug("the DHT did not take the withdrawal: %s", error)
