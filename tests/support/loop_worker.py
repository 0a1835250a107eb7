"""A stage's worker without a thread: computes on the trio loop, in the clock's own time."""

from __future__ import annotations

from collections.abc import Callable

import trio

from shardmesh.listener.scheduler import Scheduler
from shardmesh.listener.stage_session import Work
from shardmesh.listener.worker import Calculation


class LoopWorker:
    """As `listener.worker.Worker`; `seconds_of(n_tokens)` is how long a micro-batch takes."""

    def __init__(
        self,
        calculation: Calculation[Work],
        seconds_of: Callable[[int], float] = lambda n_tokens: 0.0,
    ) -> None:
        self._calculation = calculation
        self._seconds_of = seconds_of
        self._scheduler: Scheduler[Work] = Scheduler(calculation.together)
        self._jobs: list[Callable[[], None]] = []
        self._changed = trio.Event()

    def add(self, session: bytes, n_tokens: int, item: Work) -> None:
        self._scheduler.add(session, n_tokens, item)
        self._changed.set()

    def wake(self) -> None:
        """It has been woken already."""

    def forget(self, session: bytes, is_void: Callable[[Work], bool] | None = None) -> None:
        self._scheduler.remove(session, is_void)

    def do(self, job: Callable[[], None]) -> None:
        self._jobs.append(job)
        self._changed.set()

    async def run(self) -> None:
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            while self._jobs or self._scheduler:
                jobs, self._jobs = self._jobs, []
                for job in jobs:
                    job()
                works = self._scheduler.next_batch()
                await trio.sleep(sum(self._seconds_of(work.batch.n_tokens) for work in works))
                self._calculation.compute(works)
