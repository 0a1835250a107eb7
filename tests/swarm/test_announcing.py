"""Telling of oneself: no change waits for the DHT, nor for a neighbour that is slow."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import cast

import trio
import trio.testing
from support.announcements import CLUSTER, capabilities

from shardmesh.errors import UnreachableError
from shardmesh.swarm.announcing import Announcer, Offer, Teller
from shardmesh.swarm.dht import Dht
from shardmesh.swarm.directory import Directory
from shardmesh.swarm.host import Host
from shardmesh.swarm.identity import new_identity
from shardmesh.wire.announcement import open_signed

DHT_OPERATION_S = 0.5
IDENTITY = new_identity()


class SlowDht:
    """Takes as long as a real one."""

    def __init__(self) -> None:
        self.sequences: list[int] = []
        self.fails = False

    async def announce(self, shard_id: int, signed: bytes) -> None:
        await trio.sleep(DHT_OPERATION_S)
        if self.fails:
            raise UnreachableError("nobody takes it")
        self.sequences.append(open_signed(signed).sequence)


class Announcing:
    """An announcer with neighbours that note when they are told what."""

    def __init__(self, **delays_s: float) -> None:
        self.dht = SlowDht()
        self.clock_is_ahead_s = 0.0
        self.directory = Directory(CLUSTER, lambda: self.wall_clock_s())
        self.name = "fairy"
        self.told: dict[str, list[tuple[float, str]]] = {name: [] for name in delays_s}
        self._delays_s = delays_s
        host = SimpleNamespace(peer_id=IDENTITY.peer_id, addresses=list)
        self.announcer = Announcer(
            cast(Host, host),
            cast(Dht, self.dht),
            self.directory,
            self._offer,
            signer=IDENTITY,
            teller=Teller(lambda: list(delays_s), self._tell),
            refresh_interval_s=300,
            logger=logging.getLogger("test"),
        )

    def _offer(self) -> Offer:
        return Offer(
            shard_id=0,
            total_shards=1,
            total_layers=2,
            layer_start=0,
            layer_end=2,
            model_name=self.name,
            manifest_digest="ab" * 32,
            engine_fingerprint="fake-1",
            capabilities=capabilities(),
        )

    async def _tell(self, peer_id: str) -> None:
        assert self.announcer.signed is not None
        name = open_signed(self.announcer.signed).model_name
        await trio.sleep(self._delays_s[peer_id])
        self.told[peer_id].append((trio.current_time(), name))

    def wall_clock_s(self) -> float:
        """One that goes as fast as trio's own."""
        return 1_790_000_000 + trio.current_time() + self.clock_is_ahead_s

    def change(self, name: str, *, is_load: bool = False) -> None:
        self.name = name
        self.announcer.change(is_load=is_load)


@asynccontextmanager
async def running(**delays_s: float) -> AsyncIterator[Announcing]:
    announcing = Announcing(**delays_s)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(announcing.announcer.run)
        yield announcing
        nursery.cancel_scope.cancel()


async def test_a_change_does_not_wait_for_the_dht(autojump_clock: trio.testing.MockClock) -> None:
    async with running(near=0.0) as announcing:
        await trio.sleep(0.1)
        announcing.change("changed")  # the DHT is still busy with the one before
        await trio.sleep(0.01)
        assert announcing.told["near"] == [(0.0, "fairy"), (0.1, "changed")]
        await trio.sleep(2 * DHT_OPERATION_S)
        assert len(announcing.dht.sequences) == 2


async def test_a_slow_neighbour_holds_up_nobody_and_hears_the_newest(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(near=0.0, far=3.0) as announcing:
        for number in range(1, 6):
            await trio.sleep(0.1)
            announcing.change(f"change {number}")
        await trio.sleep(10)
        assert [name for _, name in announcing.told["near"]][-1] == "change 5"
        assert len(announcing.told["near"]) == 6
        assert [name for _, name in announcing.told["far"]] == ["fairy", "change 5"]


async def test_the_dht_hears_nothing_of_mere_load(autojump_clock: trio.testing.MockClock) -> None:
    async with running(near=0.0) as announcing:
        await announcing.announcer.announced.wait()
        announcing.change("busy", is_load=True)
        await trio.sleep(10)
        assert len(announcing.told["near"]) == 2
        assert len(announcing.dht.sequences) == 1


async def test_the_dht_is_tried_again_and_everything_renewed_in_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(near=0.0) as announcing:
        announcing.dht.fails = True
        await trio.sleep(1)
        announcing.dht.fails = False
        with trio.fail_after(15):
            await announcing.announcer.announced.wait()
        n_told = len(announcing.told["near"])
        await trio.sleep(301)
        assert len(announcing.told["near"]) == n_told + 1
        assert len(announcing.dht.sequences) == 2


async def test_a_clock_that_was_set_makes_it_announce_anew(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """By the new time what was said before has expired, or is from the future."""
    async with running(near=0.0) as announcing:
        await trio.sleep(20)
        assert len(announcing.told["near"]) == 1
        for announcing.clock_is_ahead_s in (3600.0, -3600.0):
            n_told = len(announcing.told["near"])
            await trio.sleep(20)
            assert len(announcing.told["near"]) == n_told + 1
            assert announcing.announcer.signed is not None
            told = open_signed(announcing.announcer.signed)
            assert abs(told.issued_at_s - announcing.wall_clock_s()) < 30


async def test_what_a_node_said_before_it_was_started_again_is_older(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Although its clock was ahead then: a neighbour has told it of its own former word."""
    former = Announcing()
    former.clock_is_ahead_s = 60.0
    withdrawn = former.announcer.sign(0)
    again = Announcing()
    assert again.directory.update(withdrawn)
    assert again.directory.all() == []
    again.announcer.sign(600)
    assert again.directory.get(IDENTITY.peer_id) is not None


async def test_two_who_tell_at_once_tell_one_after_the_other(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Both were asked before either had begun."""
    n_telling = n_told = 0

    async def tell(peer_id: str) -> None:
        nonlocal n_telling, n_told
        n_telling += 1
        assert n_telling == 1
        await trio.sleep(0.1)
        n_telling -= 1
        n_told += 1

    teller = Teller(lambda: ["neighbour"], tell)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(teller.tell_all)
        nursery.start_soon(teller.tell_all)
    assert n_told in (1, 2)
