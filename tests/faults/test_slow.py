"""A replica that computes ten times slower than it did: left for another one by new sessions."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from faults.conftest import Measured
from faults.fortress import Fortress, percentile, request

from shardmesh.coordinator.client import Client
from shardmesh.coordinator.generate import Piece

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(600)]

PERIOD_S = 0.02
N_RUNS = 10
N_TOKENS = 40
AVOIDED_WITHIN_S = 10.0


@contextmanager
def ten_times_slower(process: psutil.Process) -> Iterator[None]:
    """Stops the process for nine tenths of every period."""
    is_over = threading.Event()

    def hold_up() -> None:
        while not is_over.wait(PERIOD_S / 10):
            process.suspend()
            is_over.wait(PERIOD_S * 9 / 10)
            process.resume()

    thread = threading.Thread(target=hold_up)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        process.resume()


async def paces(client: Client, n_runs: int) -> tuple[list[float], list[str]]:
    """Times between tokens of some runs, and the first stage of the last chain."""
    gaps_s: list[float] = []
    chain: list[str] = []
    for _ in range(n_runs):
        last_s = 0.0
        async with client.coordinator.complete(request("Once", n_tokens=N_TOKENS)) as completion:
            async for item in completion.items:
                if isinstance(item, Piece):
                    now_s = time.monotonic()
                    if last_s:
                        gaps_s.append(now_s - last_s)
                    last_s = now_s
            chain = [stage.peer_id for stage in completion.chain.stages]
    return gaps_s, chain


def test_a_slow_replica_is_avoided(fortress: Fortress, measured: Measured) -> None:
    async def use(client: Client) -> None:
        healthy, chain = await paces(client, N_RUNS)
        slow = chain[1]
        with ten_times_slower(fortress.node(slow).running.data_process()):
            begun_s = time.monotonic()
            while slow in chain:
                _, chain = await paces(client, 1)
                assert time.monotonic() - begun_s < AVOIDED_WITHIN_S, "it is still used"
            avoided_s = time.monotonic() - begun_s
            after, chain = await paces(client, N_RUNS)
        before_s, after_s = percentile(healthy, 0.99), percentile(after, 0.99)
        measured(
            f"avoided after {avoided_s:.1f} s; p99 of a token {1e3 * before_s:.0f} ms before, "
            f"{1e3 * after_s:.0f} ms after"
        )
        assert after_s < 2 * before_s

    fortress.run(use)
    fortress.wait_whole()
