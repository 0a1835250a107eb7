"""Which chain a request gets, by what was heard of its replicas a moment ago."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from shardmesh.coordinator.chain import Replica
from shardmesh.coordinator.linked_chain import ChainLinker, Wish
from shardmesh.coordinator.replacements import ASIDE_SHORT_S
from shardmesh.errors import BusyError, IncompleteError, UnreachableError

FULL = BusyError("all sequences of this node are in use")


class CountingPool:
    """Has a link to everybody, and notes whom it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def get(self, peer_id: str, addresses: object, timeout_s: float):  # type: ignore[no-untyped-def]
        self.asked.append(peer_id)

        class Open:
            is_suspected = False

        return Open()

    def open_link(self, peer_id: str) -> None:
        return None

    def round_trips_us(self) -> dict[str, int]:
        return {}


def replica(peer_id: str, shard_id: int) -> Replica:
    return Replica(
        peer_id=peer_id,
        addresses=(),
        model_name="m",
        manifest_digest="d",
        shard_id=shard_id,
        layer_start=shard_id,
        layer_end=shard_id + 1,
        n_layer=2,
        n_ctx=64,
        shard_loaded=True,
        fingerprint="f",
    )


FIRST, SECOND, OTHER = replica("first", 0), replica("second", 1), replica("other second", 1)
ALL = [FIRST, SECOND, OTHER]


class Asking:
    """A linker, and what one of its sessions tells of replicas."""

    def __init__(self) -> None:
        self.pool = CountingPool()
        self.linker = ChainLinker(self.pool, dict)  # type: ignore[arg-type]
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
