"""Listeners that go where they are needed more: never all at once, never with a session."""

from __future__ import annotations

import dataclasses
import random

import pytest
import trio
import trio.testing

from shardmesh.errors import InputError, UnreachableError
from shardmesh.listener.assignment import Serving
from shardmesh.listener.moving import NOT_AGAIN_S, SETTLE_S, keep_useful
from shardmesh.listener.node import Intention

INTERVAL_S = 60.0
LOAD_S = 20.0
NEWS_S = SETTLE_S / 2 - 0.1  # until everybody knows


class World:
    """Nodes that hear of each other late; all of them want to be useful."""

    def __init__(self, n_shards: int, shard_ids: list[int]) -> None:
        self.n_shards = n_shards
        self.nodes = [OneOf(self, f"node-{n}", shard_id) for n, shard_id in enumerate(shard_ids)]
        self.served_ever: set[int] = set()

    def served(self) -> dict[int, int]:
        """How many take sessions of each shard now; fails when one that was served is not."""
        n_served = dict.fromkeys(range(self.n_shards), 0)
        for node in self.nodes:
            if node.is_alive and node.serving.is_loaded and not node.serving.is_draining:
                n_served[node.serving.shard_id] += 1
        return n_served

    def check(self, before: dict[int, int]) -> None:
        for shard_id, n_before in before.items():
            assert not n_before or self.served()[shard_id], f"a hole at shard {shard_id}"


class OneOf:
    """A node of that world, as what moves."""

    def __init__(self, world: World, peer_id: str, shard_id: int) -> None:
        self.world = world
        self.serving = Serving(peer_id=peer_id, shard_id=shard_id, n_parallel=4, is_loaded=True)
        self.n_running = 0
        self.is_alive = True
        self.cannot: set[int] = set()
        self.provided: list[int] = []
        self._told: list[tuple[float, Serving]] = []
        self.interval_s = INTERVAL_S
        self._tell()

    @property
    def total_shards(self) -> int:
        return self.world.n_shards

    def _tell(self) -> None:
        now_s = trio.current_time() if self._told else -1e9
        self._told.append((now_s + (random.uniform(0, NEWS_S) if self._told else 0), self.serving))

    def as_told(self) -> Serving:
        now_s = trio.current_time()
        return [serving for told_s, serving in self._told if told_s <= now_s][-1]

    def _become(self, **changes: object) -> None:
        before = self.world.served()
        self.serving = dataclasses.replace(self.serving, **changes)  # type: ignore[arg-type]
        self._tell()
        self.world.check(before)

    def own(self) -> Serving | None:
        return self.serving if self.serving.is_loaded else None

    async def others(self) -> list[Serving]:
        await trio.lowlevel.checkpoint()
        return [node.as_told() for node in self.world.nodes if node is not self and node.is_alive]

    async def n_sessions(self) -> int:
        await trio.lowlevel.checkpoint()
        return self.n_running

    async def tell(self, intention: Intention) -> None:
        await trio.lowlevel.checkpoint()
        changes = {
            "is_draining": intention == "leaves",
            "wants_to_leave": intention == "wants_to_leave",
        }
        if changes != {name: getattr(self.serving, name) for name in changes}:
            self._become(**changes)

    async def provide(self, shard_id: int) -> None:
        self.provided.append(shard_id)
        await trio.sleep(random.uniform(0, LOAD_S))
        if shard_id in self.cannot:
            raise InputError("nobody has published it", code="SHARD_NOT_FOUND")

    async def serve(self, shard_id: int) -> None:
        assert not self.n_running
        self._become(shard_id=shard_id, is_loaded=False, is_draining=False, wants_to_leave=False)
        await trio.sleep(random.uniform(0, LOAD_S))
        if shard_id in self.cannot:
            raise UnreachableError("it was not loaded in time")
        self._become(is_loaded=True)


async def _let_live(world: World, for_s: float) -> None:
    async with trio.open_nursery() as nursery:
        for node in world.nodes:
            if node.is_alive:
                nursery.start_soon(keep_useful, node)
        await trio.sleep(for_s)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("shard_ids", [[0, 0], [0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1], [0, 0, 1, 1]])
async def test_all_look_at_once_and_no_hole_comes_of_it(
    seed: int, shard_ids: list[int], autojump_clock: trio.testing.MockClock
) -> None:
    random.seed(seed)
    world = World(3, shard_ids)
    await _let_live(world, 100 * INTERVAL_S)
    counts = sorted(world.served().values())
    wanted = {2: [0, 1, 1], 4: [1, 1, 2], 7: [2, 2, 3]}[len(shard_ids)]
    assert counts == wanted


async def test_the_spare_one_takes_over_from_one_that_died(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World(3, [0, 0, 1, 2])
    world.nodes[2].is_alive = False
    await _let_live(world, 10 * INTERVAL_S)
    assert world.served() == {0: 1, 1: 1, 2: 1}


async def test_a_session_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    world = World(2, [0, 0])
    for node in world.nodes:
        node.n_running = 1
    async with trio.open_nursery() as nursery:
        for node in world.nodes:
            nursery.start_soon(keep_useful, node)
        await trio.sleep(20 * INTERVAL_S)
        assert [node.serving.shard_id for node in world.nodes] == [0, 0]
        assert [node.serving.is_draining for node in world.nodes].count(True) == 1
        for node in world.nodes:
            node.n_running = 0
        await trio.sleep(INTERVAL_S)
        assert world.served() == {0: 1, 1: 1}
        nursery.cancel_scope.cancel()


async def test_who_leaves_stays_when_the_other_one_dies(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World(2, [0, 0])
    leaving, other = world.nodes
    leaving.n_running = 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_useful, leaving)
        await trio.sleep(3 * INTERVAL_S)
        assert leaving.serving.is_draining
        other.is_alive = False
        await trio.sleep(10)
        assert not leaving.serving.is_draining
        nursery.cancel_scope.cancel()


async def test_a_shard_that_cannot_be_had_is_left_alone_for_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World(2, [0, 0])
    node = world.nodes[0]
    node.cannot = {1}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_useful, node)
        await trio.sleep(NOT_AGAIN_S)
        nursery.cancel_scope.cancel()
    assert node.provided == [1]
    assert node.serving == Serving(peer_id="node-0", shard_id=0, n_parallel=4, is_loaded=True)


async def test_no_interval_no_moves(autojump_clock: trio.testing.MockClock) -> None:
    world = World(2, [0, 0])
    world.nodes[0].interval_s = 0.0
    await keep_useful(world.nodes[0])
