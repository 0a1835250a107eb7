"""The Kademlia DHT: how a node is found by those who know only the cluster's name.

Under `<cluster>/shard/<id>` stand provider records: hints of who serves a shard, which live for
48 hours and cannot be taken back.  Under a key of its own stands each node's signed announcement,
which a validator holds to its owner, its time and its sequence.  A hint without a valid
announcement counts for nothing.

The routing table holds whom this node itself has met and knows to serve the DHT (bootstraps and
listeners that announced themselves), and only until they cannot be reached.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.kad_dht import kad_dht, peer_routing, provider_store
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.routing_table import RoutingTable
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.records.validator import NamespacedValidator, Validator
from libp2p.tools.anyio_service import background_trio_service

from shardmesh.errors import ProtocolError, UnreachableError, carried_past
from shardmesh.swarm.host import Host
from shardmesh.wire.announcement import Announcement, check_not_ahead, check_timely, open_signed
from shardmesh.wire.limits import (
    ANNOUNCEMENT_LIFETIME_MAX_S,
    DHT_KEY_BYTES_MAX,
    DHT_OPERATION_TIMEOUT_S,
    DHT_PROVIDERS_MAX,
    DHT_QUERY_TIMEOUT_S,
)

_NAMESPACE = "shardmesh"
_log = logging.getLogger(__name__)


def shard_key(cluster: str, shard_id: int) -> str:
    """The key of a shard's provider records; a cluster's long name is replaced by its hash."""
    key = f"{cluster}/shard/{shard_id}"
    if len(key.encode()) > DHT_KEY_BYTES_MAX:
        key = f"{hashlib.sha256(cluster.encode()).hexdigest()[:24]}/shard/{shard_id}"
    return key


def announcement_key(cluster: str, peer_id: str) -> str:
    """The key of a node's announcement: a hash, since a peer id alone would be too long."""
    digest = hashlib.sha256(f"{cluster}\0{peer_id}".encode()).hexdigest()
    return f"/{_NAMESPACE}/{digest}"[:DHT_KEY_BYTES_MAX]


class AnnouncementValidator(Validator):
    """Accepts under a key only what its owner signed and what is still true."""

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        self._wall_clock = wall_clock

    def validate(self, key: str, value: bytes) -> None:
        """Raises ProtocolError for a value that must not be stored under the key."""
        announcement = open_signed(value)
        if key != announcement_key(announcement.cluster, announcement.peer_id):
            raise ProtocolError("an announcement under the key of another node")
        now_s = self._wall_clock()
        check_not_ahead(announcement, now_s)
        if announcement.is_withdrawal:  # kept for as long as what it takes back could live
            now_s -= ANNOUNCEMENT_LIFETIME_MAX_S
        if announcement.expires_at_s <= now_s:
            raise ProtocolError("an announcement has expired", code="EXPIRED")

    def select(self, key: str, values: list[bytes]) -> int:
        """The newest; of equals the later one, or refreshing a record would fail."""
        sequences = [open_signed(value).sequence for value in values]
        return max(range(len(values)), key=lambda index: (sequences[index], index))


class Dht:
    """The DHT as the mesh uses it; made by `open_dht`."""

    def __init__(
        self, host: Host, kad: KadDHT, cluster: str, wall_clock: Callable[[], float]
    ) -> None:
        self._host = host
        self._kad = kad
        self._cluster = cluster
        self._wall_clock = wall_clock
        self._routing_listeners: list[Callable[[str], None]] = []
        table = kad.routing_table
        self._add_peer = table.add_peer
        table.add_peer = self._refresh_member  # type: ignore[method-assign, assignment]
        host.on_forgotten(lambda peer_id: _remove(table, peer_id))

    def known_nodes(self) -> list[str]:
        """Peer ids in the routing table."""
        return [str(peer_id) for peer_id in self._kad.routing_table.get_peer_ids()]

    def on_routing_updated(self, listener: Callable[[str], None]) -> None:
        """Calls the listener with each peer id that comes into the routing table."""
        self._routing_listeners.append(listener)

    async def add(self, peer_id: str) -> None:
        """Puts a connected node, which must serve the DHT, into the routing table."""
        node = ID.from_base58(peer_id)
        if self._kad.routing_table.peer_in_table(node):
            return
        if await self._add_peer(node, skip_server_mode_check=True):
            for listener in self._routing_listeners:
                listener(peer_id)

    async def _refresh_member(
        self, peer: PeerInfo | ID, *, skip_server_mode_check: bool = False
    ) -> bool:
        """The library adds whoever asks or is named by others; here that only renews a member.

        A command that asks and leaves would otherwise stay in every table as a ghost.
        """
        peer_id = peer.peer_id if isinstance(peer, PeerInfo) else peer
        if not self._kad.routing_table.peer_in_table(peer_id):
            return False
        return await self._add_peer(peer, skip_server_mode_check=True)

    async def refresh(self) -> None:
        """Looks around for nodes; the library itself does so only every ten minutes."""
        with _deadline("looking for nodes"):
            await self._kad.refresh_routing_table()

    async def announce(self, shard_id: int, signed: bytes) -> None:
        """Says that this node serves the shard and stores its signed announcement.

        Raises UnreachableError (the moment's) if nobody takes it in time.
        """
        announcement = open_signed(signed)
        with _deadline("announcing"):
            if not await self._kad.provide(shard_key(self._cluster, shard_id)):
                raise UnreachableError("no node of the DHT can be reached", next_step="Try again.")
            await self._put(announcement, signed)

    async def provide(self, key: str) -> None:
        """Says that this node has what the key stands for; a hint that lives for 48 hours.

        Raises UnreachableError (the moment's) if nobody takes it in time.
        """
        with _deadline("registering"):
            if not await self._kad.provide(key):
                raise UnreachableError("no node of the DHT can be reached", next_step="Try again.")

    async def find_providers(self, key: str) -> dict[str, list[str]]:
        """Peer id -> addresses of who is said to have what the key stands for, this node apart.

        Raises UnreachableError (the moment's) if it takes too long.
        """
        with _deadline("looking for providers"):
            found = await self._ask_providers(key)
        own = self._host.peer_id
        return {
            str(info.peer_id): [str(address) for address in info.addrs]
            for info in found
            if str(info.peer_id) != own
        }

    async def withdraw(self, signed: bytes) -> None:
        """Replaces the stored announcement by a withdrawal; provider records just expire."""
        with _deadline("withdrawing"):
            await self._put(open_signed(signed), signed)

    async def _put(self, announcement: Announcement, signed: bytes) -> None:
        key = announcement_key(announcement.cluster, announcement.peer_id)
        try:
            await self._kad.put_value(key, signed)
        except (BaseLibp2pError, ValueError) as error:
            raise UnreachableError(f"the DHT did not take an announcement: {error}") from error

    async def find_announcements(self, shard_id: int) -> list[bytes]:
        """Signed, timely announcements of nodes that serve the shard, asked from the network.

        Raises UnreachableError (the moment's) if it takes too long.
        """
        with _deadline(f"looking for shard {shard_id}"):
            holders = await self._find_providers(shard_key(self._cluster, shard_id))
            found: list[bytes] = []
            async with trio.open_nursery() as nursery:
                for peer_id in holders:
                    nursery.start_soon(self._find_announcement, peer_id, found)
        return found

    async def _find_providers(self, key: str) -> set[str]:
        return {str(provider.peer_id) for provider in await self._ask_providers(key)}

    async def _ask_providers(self, key: str) -> list[PeerInfo]:
        """Asks the network, although the library is content with what lies here."""
        store = self._kad.provider_store
        held = store.providers.pop(key.encode(), {})
        try:
            asked = await self._kad.find_providers(key, DHT_PROVIDERS_MAX)
        finally:
            store.providers[key.encode()] = {**held, **store.providers.get(key.encode(), {})}
        return [*asked, *(record.provider_info for record in held.values())]

    async def _find_announcement(self, peer_id: str, found: list[bytes]) -> None:
        """Adds the newest announcement of a node, from the network or from what lies here."""
        key = announcement_key(self._cluster, peer_id)
        store = self._kad.value_store
        held = store.store.pop(key.encode(), None)
        try:
            values = [value for value in (await self._kad.get_value(key),) if value is not None]
            if held is not None:
                values.append(held[0].value)
            if values:
                newest = max(values, key=lambda value: open_signed(value).sequence)
                check_timely(open_signed(newest), cluster=self._cluster, now_s=self._wall_clock())
                found.append(newest)
        except (BaseLibp2pError, ProtocolError, ValueError) as error:
            _log.debug("the DHT gave no announcement of %s: %s", peer_id, error)
        finally:
            if held is not None:
                store.store.setdefault(key.encode(), held)


@asynccontextmanager
async def open_dht(
    host: Host,
    *,
    cluster: str,
    server: bool = True,
    wall_clock: Callable[[], float] = time.time,
) -> AsyncIterator[Dht]:
    """Runs the DHT on a host; a client (`server=False`) asks but keeps nothing for others."""
    for module in (kad_dht, peer_routing, provider_store):
        module.QUERY_TIMEOUT = DHT_QUERY_TIMEOUT_S  # type: ignore[attr-defined]
    kad = KadDHT(
        host.libp2p,
        DHTMode.SERVER if server else DHTMode.CLIENT,
        validator=NamespacedValidator(
            {_NAMESPACE: AnnouncementValidator(wall_clock)}, strict_validation=True
        ),
        validator_changed=True,
        strict_validation=True,
    )
    with carried_past() as block:
        async with background_trio_service(kad):
            with block():
                yield Dht(host, kad, cluster, wall_clock)


def _remove(table: RoutingTable, peer_id: str) -> None:
    table.remove_peer(ID.from_base58(peer_id))


@contextmanager
def _deadline(what: str) -> Iterator[None]:
    """Bounds a DHT operation; raises UnreachableError when it takes too long."""
    with trio.move_on_after(DHT_OPERATION_TIMEOUT_S) as scope:
        yield
    if scope.cancelled_caught:
        raise UnreachableError(f"{what} in the DHT took too long", next_step="Try again.")
