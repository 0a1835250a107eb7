"""Calls into an engine: how long each has been seen, and which one is late."""

from __future__ import annotations

import pytest

from shardmesh.engine.watchdog import Watchdog
from shardmesh.wire.limits import ENGINE_CALL_TIMEOUT_S, GRAMMAR_STEP_TIMEOUT_S


def n_looks_until_late(watchdog: Watchdog) -> int:
    n_looks = 1
    while watchdog.look(1.0) is None:
        n_looks += 1
    return n_looks


@pytest.mark.parametrize("limit_s", [ENGINE_CALL_TIMEOUT_S, GRAMMAR_STEP_TIMEOUT_S])
def test_a_call_is_late_behind_its_limit_and_not_before(limit_s: float) -> None:
    watchdog = Watchdog()
    with watchdog.within(limit_s):
        assert n_looks_until_late(watchdog) == limit_s + 1


def test_one_call_after_the_other_is_never_late() -> None:
    watchdog = Watchdog()
    for _ in range(100):
        with watchdog.within(2.0):
            assert watchdog.look(1.0) is None
        assert watchdog.look(1.0) is None


def test_the_inner_call_is_the_one_that_hangs() -> None:
    watchdog = Watchdog()
    with watchdog.within(120.0):
        with watchdog.within(10.0, grammar="root"):
            assert n_looks_until_late(watchdog) == 11
            late = watchdog.look(0.0)
            assert late is not None
            assert (late.grammar, late.limit_s) == ("root", 10.0)
        assert watchdog.look(1.0) is None


def test_a_call_that_raises_is_over() -> None:
    watchdog = Watchdog()
    with pytest.raises(ValueError, match="no"), watchdog.within(1.0):
        raise ValueError("no")
    assert watchdog.look(10.0) is None
