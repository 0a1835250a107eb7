"""The thread that computes: everything once and in order, however often it falls asleep."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import trio

from shardmesh.listener.worker import Worker

SESSION = b"session"
N_ROUNDS = 200


class Calls:
    """A calculation out of a function; each item goes alone."""

    def __init__(self, compute: Callable[[Sequence[int]], None]) -> None:
        self.compute = compute

    def together(self, waiting: Sequence[int]) -> Sequence[int]:
        return [0]


async def test_each_micro_batch_wakes_it_and_is_computed_once_in_order() -> None:
    computed: list[int] = []
    token = trio.lowlevel.current_trio_token()
    done = trio.Event()

    def compute(items: Sequence[int]) -> None:
        computed.extend(items)
        token.run_sync_soon(lambda: done.set())

    worker = Worker(Calls(compute))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run)
        for number in range(N_ROUNDS):
            done = trio.Event()
            worker.add(SESSION, 1, number)
            worker.wake()
            with trio.fail_after(10):
                await done.wait()
        nursery.cancel_scope.cancel()
    assert computed == list(range(N_ROUNDS))


async def test_jobs_and_micro_batches_in_any_mixture() -> None:
    seen: list[str] = []
    ended = trio.Event()
    token = trio.lowlevel.current_trio_token()
    expected = {f"item {number}" for number in (*range(0, N_ROUNDS, 3), N_ROUNDS)}

    def compute(items: Sequence[int]) -> None:
        seen.extend(f"item {item}" for item in items)
        if expected <= set(seen):
            token.run_sync_soon(ended.set)

    worker = Worker(Calls(compute))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run)
        for number in range(N_ROUNDS):
            worker.do(lambda number=number: seen.append(f"job {number}"))  # type: ignore[misc]
            if number % 3 == 0:
                worker.add(bytes([number]), 1, number)
                worker.wake()
            if number % 7 == 0:
                await trio.lowlevel.checkpoint()
        worker.add(SESSION, 1, N_ROUNDS)
        worker.wake()
        with trio.fail_after(10):
            await ended.wait()
        nursery.cancel_scope.cancel()
    assert [each for each in seen if each.startswith("job")] == [
        f"job {number}" for number in range(N_ROUNDS)
    ]
    items = [each for each in seen if each.startswith("item")]
    assert sorted(items) == sorted(expected)


async def test_the_loop_does_not_wait_for_a_thread_that_is_busy() -> None:
    goes_on = threading.Event()
    computed: list[int] = []

    def compute(items: Sequence[int]) -> None:
        goes_on.wait(10)
        computed.extend(items)

    worker = Worker(Calls(compute))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run)
        for number in range(5):
            worker.add(SESSION, 1, number)
            worker.wake()
        assert computed == []
        goes_on.set()
        nursery.cancel_scope.cancel()  # waits for the pass under way only
    assert computed == computed[:1] == list(range(len(computed)))
