"""The thread that computes: takes work from the scheduler, runs the engine, hands results on.

It sends what it computed by itself, since a detour over the trio thread costs more than a small
stage computes.  What belongs to one sequence keeps its order: a job (open, trim, close) is done
behind the pass that was under way when it was given, and before any later one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import trio

from shardmesh.listener.scheduler import Scheduler

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Given = TypeVar("Given", contravariant=True)
Job = Callable[[], None]

HAND_OVER_S = 0.0005
"""How long the loop waits at most until the thread that it has woken has begun."""


class Calculation(Protocol[Given]):
    """What a worker does with its items, in its thread; nothing of it may raise."""

    def compute(self, items: Sequence[Given]) -> None: ...

    def together(self, waiting: Sequence[Given]) -> Sequence[int]:
        """See `scheduler.Together`; with the worker's lock held."""
        ...


class Computes(Protocol[Item]):
    """Whatever does a stage's work: the thread below, or a simulation of it."""

    def add(self, session: bytes, n_tokens: int, item: Item) -> None: ...

    def wake(self) -> None: ...

    def forget(self, session: bytes, is_void: Callable[[Item], bool] | None = None) -> None: ...

    def do(self, job: Job) -> None: ...

    async def run(self) -> None: ...


class Worker(Generic[Item]):
    """One thread with a queue, which does the calculation and jobs; these may not raise either."""

    def __init__(self, calculation: Calculation[Item]) -> None:
        self._calculation = calculation
        self._scheduler: Scheduler[Item] = Scheduler(calculation.together)
        self._jobs: list[Job] = []
        self._is_stopping = False
        self._lock = threading.Lock()
        self._is_idle = False
        # Plain locks: a Condition takes five steps in Python to wake somebody up.
        self._woken = threading.Lock()  # to be had once for each time that the thread went idle
        self._woken.acquire()
        self._begun = threading.Lock()  # to be had once the thread is awake
        self._begun.acquire()

    def add(self, session: bytes, n_tokens: int, item: Item) -> None:
        """Queues a micro-batch, for which the thread is not woken yet.

        Raises ProtocolError (theirs) when its session has too many.
        """
        with self._lock:
            self._scheduler.add(session, n_tokens, item)

    def wake(self) -> None:
        """Has the thread begin with what was added, if it waits."""
        with self._lock:
            is_woken = bool(self._scheduler) and self._wake()
        if is_woken:
            # Else it would wait for the interpreter while the loop tidies up: 40 us of each hop.
            self._begun.acquire(timeout=HAND_OVER_S)

    def forget(self, session: bytes, is_void: Callable[[Item], bool] | None = None) -> None:
        """Drops what waits of a session, or what of it is void; what is computed is not stopped."""
        with self._lock:
            self._scheduler.remove(session, is_void)

    def do(self, job: Job) -> None:
        """Has the thread do a job before its next batch."""
        with self._lock:
            self._jobs.append(job)
            self._wake()

    async def run(self) -> None:
        """Works until cancelled; the pass under way is waited for."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, self._work)
            try:
                await trio.sleep_forever()
            finally:
                with self._lock:
                    self._is_stopping = True
                    self._wake()

    def _wake(self) -> bool:
        """Wakes the thread if it is idle; with the lock held."""
        if not self._is_idle:
            return False
        self._is_idle = False
        self._begun.acquire(blocking=False)  # it can be had if nobody waited the last time
        self._woken.release()
        return True

    def _work(self) -> None:
        while not self._is_stopping:
            with self._lock:
                jobs, self._jobs = self._jobs, []
                items = self._scheduler.next_batch()
                is_idle = self._is_idle = not (jobs or items or self._is_stopping)
            for job in jobs:
                job()
            if items:
                self._calculation.compute(items)
            if is_idle:
                self._woken.acquire()
                self._begun.release()
