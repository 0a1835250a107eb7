"""Who may generate now, per model: so many at once, the others wait in order of priority."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import trio

from shardmesh.coordinator.chain import Replica
from shardmesh.errors import BusyError
from shardmesh.wire.limits import REQUEST_QUEUE_TIMEOUT_S, REQUESTS_WAITING_MAX


def capacity(replicas: Iterable[Replica], n_parallel: dict[str, int]) -> int:
    """Sessions that the stages of one model can hold at once, at least 1.  Pure.

    `n_parallel` by peer id; the stage with the fewest sequences on all its replicas decides.
    """
    by_stage: dict[int, int] = {}
    for replica in replicas:
        if replica.shard_loaded:
            room = n_parallel.get(replica.peer_id, 0)
            by_stage[replica.layer_start] = by_stage.get(replica.layer_start, 0) + room
    return max(1, min(by_stage.values(), default=1))


class ModelQueue:
    """Places for the sessions of one model."""

    def __init__(self, n_waiting_max: int = REQUESTS_WAITING_MAX) -> None:
        self.n_running = 0
        self._n_waiting_max = n_waiting_max
        self._order = itertools.count()
        self._waiting: list[tuple[int, int, trio.Event]] = []

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def place(self, n_places: int, priority: int = 0) -> AsyncIterator[None]:
        """A place among `n_places`, until the block is left; lower priorities come first.

        Raises BusyError (the moment's) if too many wait already, or none comes free in time.
        """
        await self._take(n_places, priority)
        try:
            yield
        finally:
            self.n_running -= 1
            self._call_next(n_places)

    async def _take(self, n_places: int, priority: int) -> None:
        if self.n_running < n_places and not self._waiting:
            self.n_running += 1
            return
        if len(self._waiting) >= self._n_waiting_max:
            raise BusyError(
                f"{len(self._waiting)} requests wait for this model already",
                next_step="try again shortly, or add replicas",
            )
        entry = (priority, next(self._order), trio.Event())
        heapq.heappush(self._waiting, entry)
        self._call_next(n_places)  # there may be more places than when the others came
        called = entry[2]
        try:
            with trio.fail_after(REQUEST_QUEUE_TIMEOUT_S):
                await called.wait()
        except BaseException as error:
            if called.is_set():
                self.n_running -= 1  # its place was given away already
                self._call_next(n_places)
            else:
                self._waiting.remove(entry)
                heapq.heapify(self._waiting)
            if isinstance(error, trio.TooSlowError):
                raise BusyError(
                    "no place came free in time", next_step="try again shortly, or add replicas"
                ) from None
            raise

    def _call_next(self, n_places: int) -> None:
        while self._waiting and self.n_running < n_places:
            self.n_running += 1
            heapq.heappop(self._waiting)[2].set()
