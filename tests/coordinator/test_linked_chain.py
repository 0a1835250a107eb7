"""Which chain a request gets, by what was heard of its replicas a moment ago."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import trio
import trio.testing
from support.replicas import replica

from shardmesh.coordinator.chain import Chain, Replica
from shardmesh.coordinator.linked_chain import (
    SPARES_MAX,
    SPARES_PER_STAGE,
    ChainLinker,
    Wish,
    spares,
)
from shardmesh.coordinator.replacements import ASIDE_SHORT_S
from shardmesh.errors import BusyError, IncompleteError, UnreachableError

FULL = BusyError("all sequences of this node are in use")


class CountingPool:
    """Has a link to everybody, and notes whom it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.dialed_soon: list[str] = []
        self.linked = dict[str, object]()

    async def get(self, peer_id: str, addresses: object, timeout_s: float):  # type: ignore[no-untyped-def]
        self.asked.append(peer_id)

        class Open:
            is_suspected = False

        return Open()

    def dial_soon(self, peer_id: str, addresses: object, timeout_s: float) -> None:
        self.dialed_soon.append(peer_id)

    def open_link(self, peer_id: str) -> object | None:
        return self.linked.get(peer_id)

    def round_trips_us(self) -> dict[str, int]:
        return {}


def of_shard(peer_id: str, shard_id: int) -> Replica:
    """One layer, which is the shard."""
    return replica(peer_id, shard_id, shard_id + 1, shard_id=shard_id, n_layer=2)


FIRST, SECOND, OTHER = of_shard("first", 0), of_shard("second", 1), of_shard("other second", 1)
ALL = [FIRST, SECOND, OTHER]


class Asking:
    """A linker, and what one of its sessions tells of replicas."""

    def __init__(self) -> None:
        self.pool = CountingPool()
        self.own_sessions = Counter[str]()
        self.linker = ChainLinker(self.pool, lambda: self.own_sessions)  # type: ignore[arg-type]
        self.finder = self.linker.finder(lambda: ALL, trio.lowlevel.checkpoint, 1.0)

    async def names(self, replicas: list[Replica] = ALL) -> list[str]:
        self.pool.asked.clear()
        linked = await self.linker.link(replicas, Wish())
        return [stage.peer_id for stage in linked.chain.stages]


async def test_one_that_is_full_is_passed_over_and_nobody_is_asked_if_all_are(
    autojump_clock: trio.testing.MockClock,
) -> None:
    asking = Asking()
    asking.finder.set_aside(SECOND, FULL)
    assert await asking.names() == ["first", "other second"]
    asking.finder.set_aside(OTHER, FULL)
    with pytest.raises(BusyError):
        await asking.names()
    assert asking.pool.asked == []
    await trio.sleep(ASIDE_SHORT_S)
    assert (await asking.names())[0] == "first"


async def test_a_place_that_comes_free_is_offered_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    asking = Asking()
    for full in (SECOND, OTHER):
        asking.finder.set_aside(full, FULL)
    asking.finder.note_room([FIRST, OTHER])
    assert await asking.names() == ["first", "other second"]


async def test_one_whose_places_are_all_ours_is_not_asked_for_another() -> None:
    asking = Asking()
    small = [dataclasses.replace(each, n_parallel=2) for each in ALL]
    chain = Chain((small[0], small[2]))
    asking.own_sessions.update({"second": 2, "first": 1})
    assert await asking.names(small) == ["first", "other second"]
    with asking.linker.reserve(chain):  # for a session that is being prepared
        asking.pool.asked.clear()
        with pytest.raises(BusyError):
            await asking.linker.link(small, Wish())
        assert asking.pool.asked == []
    assert await asking.names(small) == ["first", "other second"]


async def test_sessions_that_are_prepared_spread_as_running_ones_do() -> None:
    asking = Asking()
    pair = [FIRST, SECOND, dataclasses.replace(OTHER, token_us=SECOND.token_us)]
    with asking.linker.reserve(Chain((FIRST, SECOND))):
        assert await asking.names(pair) == ["first", "other second"]
    with asking.linker.reserve(Chain((FIRST, OTHER))):
        assert await asking.names(pair) == ["first", "second"]


async def test_one_that_failed_is_tried_if_all_others_are_full(
    autojump_clock: trio.testing.MockClock,
) -> None:
    asking = Asking()
    asking.finder.set_aside(SECOND, UnreachableError("gone", code="STAGE_LOST"))
    asking.finder.set_aside(OTHER, FULL)
    assert await asking.names() == ["first", "second"]


async def test_a_mesh_that_is_full_and_incomplete_says_that_it_is_incomplete(
    autojump_clock: trio.testing.MockClock,
) -> None:
    asking = Asking()
    asking.finder.set_aside(FIRST, FULL)
    with pytest.raises(IncompleteError):
        await asking.names([FIRST])


async def test_one_that_is_linked_takes_over_without_a_turn_of_the_loop(
    autojump_clock: trio.testing.MockClock,
) -> None:
    asking = Asking()
    asking.finder.set_aside(SECOND, FULL)
    chain = Chain((FIRST, SECOND))
    link = await asking.pool.get(OTHER.peer_id, (), 1.0)
    asking.pool.linked[OTHER.peer_id] = link
    asking.pool.asked.clear()
    with trio.testing.assert_no_checkpoints():
        assert await asking.finder.replace(chain, 1, 8) == (OTHER, link)
    assert asking.pool.asked == []
    asking.pool.linked.clear()
    assert (await asking.finder.replace(chain, 1, 8))[0] == OTHER
    assert asking.pool.asked == ["other second"]


def test_each_stage_has_a_few_spares_of_its_own_layers_and_split() -> None:
    chain = Chain((FIRST, SECOND))
    many = [of_shard(f"further second {i}", 1) for i in range(SPARES_PER_STAGE + 1)]
    assert spares(chain, [FIRST, *many, SECOND]) == many[:SPARES_PER_STAGE]
    unfit = [
        dataclasses.replace(OTHER, shard_loaded=False),
        dataclasses.replace(OTHER, manifest_digest="another"),
        dataclasses.replace(OTHER, layer_start=0),
    ]
    assert spares(chain, unfit) == []


def test_a_long_chain_does_not_have_spares_without_end() -> None:
    stages = [of_shard(f"stage {i}", i) for i in range(SPARES_MAX + 1)]
    others = [of_shard(f"other {i}", i) for i in range(SPARES_MAX + 1)]
    assert spares(Chain(tuple(stages)), others) == others[:SPARES_MAX]


async def test_spares_are_dialed_those_that_are_linked_first(
    autojump_clock: trio.testing.MockClock,
) -> None:
    asking = Asking()
    further = [of_shard(f"further {i}", 1) for i in range(5)]
    linked = await asking.linker.link([*ALL, *further], Wish())
    asking.linker.link_spares(linked)
    assert len(set(asking.pool.dialed_soon)) == SPARES_PER_STAGE
    for _ in range(20):
        asking.pool.linked = dict.fromkeys(asking.pool.dialed_soon, object())
        before = set(asking.pool.dialed_soon)
        asking.pool.dialed_soon.clear()
        asking.linker.link_spares(linked)
        assert set(asking.pool.dialed_soon) == before


async def test_no_spare_that_failed_or_that_nobody_wants(
    autojump_clock: trio.testing.MockClock,
) -> None:
    asking = Asking()
    linked = await asking.linker.link(ALL, Wish(avoid=("other second",)))
    asking.linker.link_spares(linked)
    linked = await asking.linker.link([FIRST, SECOND], Wish())
    asking.finder.set_aside(OTHER, FULL)
    asking.linker.link_spares(dataclasses.replace(linked, replicas=ALL))
    assert asking.pool.dialed_soon == []
