"""Runs a trio program so that the same seed gives the same run, step by step.

Trio can order the tasks of each step by a random generator of its own; it offers that to Hypothesis
(`trio._core._run._hypothesis_plugin_setup`), and this does the same by hand.  Time is a MockClock
that jumps to the next deadline as soon as all tasks wait.
"""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import trio
import trio.testing
from trio._core import _run as scheduler

Result = TypeVar("Result")


def run_seeded(seed: int, main: Callable[[], Awaitable[Result]]) -> Result:
    """What `main` gives when the order of its tasks is drawn from the seed."""
    with _deterministic(seed):
        return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    was_deterministic, state = scheduler._ALLOW_DETERMINISTIC_SCHEDULING, scheduler._r.getstate()
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    scheduler._r.seed(seed)
    gc.disable()  # a collection runs finalizers at moments that depend on what ran before
    try:
        yield
    finally:
        gc.enable()
        scheduler._r.setstate(state)
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = was_deterministic  # type: ignore[misc]
