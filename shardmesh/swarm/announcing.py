"""A listener's word about itself: signed, told to the neighbours at once, in time to the DHT."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Protocol

import trio

from shardmesh.errors import ShardmeshError
from shardmesh.swarm.addresses import told_addresses
from shardmesh.swarm.dht import Dht
from shardmesh.swarm.directory import Directory
from shardmesh.swarm.host import Host
from shardmesh.wire.announcement import Announcement, Capabilities, encode_signed
from shardmesh.wire.envelope import Signer
from shardmesh.wire.limits import ANNOUNCEMENT_LIFETIME_MAX_S
from shardmesh.wire.node_identity import NO_IDENTITY, NodeIdentity

_TELLS_AT_ONCE = 16
_RETRY_PAUSE_S = 10.0
_LIFETIME_MIN_S = 60
_CLOCK_LOOK_S = 5.0
_CLOCK_STEP_S = 10.0  # less changes nothing: announcements live for minutes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offer:
    """What a listener announces beside its name, addresses and times; may change any moment."""

    shard_id: int
    total_shards: int
    total_layers: int
    layer_start: int
    layer_end: int
    model_name: str
    manifest_digest: str
    engine_fingerprint: str
    capabilities: Capabilities
    identity: NodeIdentity = NO_IDENTITY


class PutsIntoDht(Protocol):
    """What is needed of `swarm.dht.Dht`."""

    async def announce(self, shard_id: int, signed: bytes) -> None: ...


class Announcer:
    """Signs what `offer()` gives whenever it has changed, and spreads it.

    A change waits for nobody: not for the DHT, whose operations take up to half a second, and not
    for a neighbour that is slow to take the change before it.
    """

    def __init__(
        self,
        host: Host,
        dht: Dht,
        directory: Directory,
        offer: Callable[[], Offer],
        *,
        signer: Signer,
        teller: Teller,
        refresh_interval_s: float,
        logger: logging.Logger,
    ) -> None:
        self.announced = trio.Event()
        """Set once a first announcement reached the DHT."""
        self.signed: bytes | None = None
        """Our announcement as others should know it; None before the first."""
        self._host = host
        self._dht: PutsIntoDht = dht
        self._directory = directory
        self._offer = offer
        self._signer = signer
        self._teller = teller
        self._refresh_interval_s = refresh_interval_s
        self._log = logger
        self._changed = trio.Event()
        self._is_changed_much = True
        self._dht_is_due = trio.Event()
        self._sequence = 0

    def change(self, *, is_load: bool) -> None:
        """What `offer()` gives has changed; the DHT is not told of a mere `is_load`."""
        self._is_changed_much |= not is_load
        self._changed.set()

    async def run(self) -> None:
        """Announces now, whenever it must be and in time before it expires, for ever."""
        refresh_at_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_in_dht)
            nursery.start_soon(self._watch_clock)
            while True:
                self._changed = trio.Event()
                self.sign(self._lifetime_s())
                nursery.start_soon(self._teller.tell_all)
                if self._is_changed_much:
                    self._is_changed_much = False
                    self._dht_is_due.set()
                    refresh_at_s = trio.current_time() + self._refresh_interval_s
                with trio.move_on_at(refresh_at_s) as refresh:
                    await self._changed.wait()
                self._is_changed_much |= refresh.cancelled_caught

    async def _watch_clock(self) -> None:
        """Announces anew when the wall clock was set: what was said before may be unbelievable."""
        while True:
            difference_s = self._directory.wall_clock() - trio.current_time()
            await trio.sleep(_CLOCK_LOOK_S)
            moved_s = self._directory.wall_clock() - trio.current_time() - difference_s
            if abs(moved_s) > _CLOCK_STEP_S:
                self._log.info("the clock of this machine was set by %+.0f s", moved_s)
                self.change(is_load=False)

    def sign(self, lifetime_s: int) -> bytes:
        """A new announcement; with a lifetime of 0 it takes back all before it."""
        now_s = self._directory.wall_clock()
        # Rises over restarts too, also if the clock was ahead before and neighbours remember that.
        known = max(self._sequence, self._directory.sequence_of(self._host.peer_id))
        self._sequence = max(known + 1, int(now_s * 1000))
        offer = self._offer()
        told = {field.name: getattr(offer, field.name) for field in dataclasses.fields(offer)}
        announcement = Announcement(
            **told,
            cluster=self._directory.cluster,
            peer_id=self._host.peer_id,
            addresses=told_addresses(self._host.addresses()),
            sequence=self._sequence,
            issued_at_s=int(now_s),
            expires_at_s=int(now_s) + lifetime_s,
        )
        self.signed = encode_signed(announcement, self._signer)
        if lifetime_s:
            self._directory.update(self.signed)
        return self.signed

    def _lifetime_s(self) -> int:
        lifetime_s = max(2 * self._refresh_interval_s, _LIFETIME_MIN_S)
        return int(min(lifetime_s, ANNOUNCEMENT_LIFETIME_MAX_S))

    async def _keep_in_dht(self) -> None:
        while True:
            await self._dht_is_due.wait()
            self._dht_is_due = trio.Event()
            while not await self._put_into_dht():
                with trio.move_on_after(min(_RETRY_PAUSE_S, self._refresh_interval_s)):
                    await self._dht_is_due.wait()

    async def _put_into_dht(self) -> bool:
        """Says whether the DHT took it."""
        shard_id, signed = self._offer().shard_id, self.signed
        if signed is None:
            return False
        try:
            await self._dht.announce(shard_id, signed)
        except ShardmeshError as error:
            self._log.warning("[DHT] ✗ Shard %d not announced: %s", shard_id, error)
            return False
        self._log.info("[DHT] ✓ Announced shard %d to DHT", shard_id)
        self.announced.set()
        return True


class Teller:
    """Has every neighbour told of the newest; one that is told just now hears it afterwards."""

    def __init__(
        self, neighbours: Callable[[], Collection[str]], tell: Callable[[str], Awaitable[None]]
    ) -> None:
        """`tell` is given a peer id and hands over what is newest at that moment."""
        self._neighbours = neighbours
        self._tell = tell
        self._is_behind: dict[str, bool] = {}  # of those that are being told
        self._limiter = trio.CapacityLimiter(_TELLS_AT_ONCE)

    async def tell_all(self) -> None:
        """Returns when all have been told, but for those that another call is telling."""
        async with trio.open_nursery() as nursery:
            for peer_id in self._neighbours():
                is_being_told = peer_id in self._is_behind
                # Now, not in the task: another call may come before that begins.
                self._is_behind[peer_id] = True
                if not is_being_told:
                    nursery.start_soon(self._tell_newest, peer_id)

    async def _tell_newest(self, peer_id: str) -> None:
        try:
            while self._is_behind[peer_id]:
                async with self._limiter:
                    self._is_behind[peer_id] = False
                    await self._tell(peer_id)
        finally:
            del self._is_behind[peer_id]
