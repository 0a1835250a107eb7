from __future__ import annotations

import pytest
import trio
import trio.testing
from support.replicas import replica

from shardmesh.errors import BusyError
from shardmesh.web.queue import ModelQueue, capacity
from shardmesh.wire.limits import REQUEST_QUEUE_TIMEOUT_S


def test_the_stage_with_the_least_room_decides() -> None:
    replicas = [
        replica("a", 0, 2),
        replica("b", 0, 2),
        replica("c", 2, 4),
        replica("d", 2, 4, shard_loaded=False),
    ]
    assert capacity(replicas, {"a": 4, "b": 4, "c": 6, "d": 9}) == 6
    assert capacity([], {}) == 1


async def test_so_many_at_once_and_the_others_by_priority(
    autojump_clock: trio.testing.MockClock,
) -> None:
    queue, order = ModelQueue(), []

    async def take(name: str, priority: int) -> None:
        async with queue.place(1, priority):
            order.append(name)
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        for name, priority in (("first", 5), ("later", 1), ("urgent", -1), ("last", 1)):
            nursery.start_soon(take, name, priority)
            await trio.testing.wait_all_tasks_blocked()
        assert (queue.n_running, queue.n_waiting) == (1, 3)
    assert order == ["first", "urgent", "later", "last"]
    assert (queue.n_running, queue.n_waiting) == (0, 0)


async def test_a_full_queue_is_busy() -> None:
    queue = ModelQueue(n_waiting_max=1)
    async with trio.open_nursery() as nursery:

        async def take() -> None:
            async with queue.place(1):
                await trio.sleep_forever()

        for _ in range(2):
            nursery.start_soon(take)
            await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(BusyError):
            async with queue.place(1):
                pass
        nursery.cancel_scope.cancel()
    assert (queue.n_running, queue.n_waiting) == (0, 0)


async def test_nobody_waits_for_ever(autojump_clock: trio.testing.MockClock) -> None:
    queue = ModelQueue()
    async with queue.place(1):
        started_s = trio.current_time()
        with pytest.raises(BusyError):
            async with queue.place(1):
                pass
        assert trio.current_time() - started_s == pytest.approx(REQUEST_QUEUE_TIMEOUT_S)
    assert (queue.n_running, queue.n_waiting) == (0, 0)


async def test_more_room_lets_more_in() -> None:
    queue = ModelQueue()
    async with queue.place(1), queue.place(2):
        assert queue.n_running == 2
