"""`idle`: what the processes of a mesh take of the processor while nobody asks anything.

Two stages, a bootstrap and a gateway whose links are up.  They are measured from outside, by the
clock that the kernel keeps of the time of a process.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import psutil
import trio

from benchmarks.gateway_process import open_connection, open_gateway_process
from benchmarks.generation import DECODE_PROMPT, N_THREADS
from benchmarks.mesh import CLUSTER, cut_model, where_of
from benchmarks.results import Figures, Result, median_of
from shardmesh.cli.demo_mesh import start_mesh
from shardmesh.errors import OurError

N_STAGES: Final = 2
N_TOKENS: Final = 8  # of the one answer that brings the links up
SETTLE_S: Final = 12.0
"""Until the first looks around are over, and threads that nobody uses have ended."""

WINDOW_S: Final = 5.0
"""One run; what happens every five seconds is in each."""

ROLES: Final = {
    "bootstrap": "bootstrap",
    "listen": "control",
    "shardmesh.listener.data_process": "data",
    "web": "gateway",
}
"""By a word of the command line."""


async def measure_waiting(model: Path, *, runs: int, progress: Callable[[str], None]) -> Result:
    """Milliseconds of processor time a second, of all processes and of one of each role."""
    async with (
        cut_model(model, N_STAGES, progress) as (folder, _),
        start_mesh(
            folder, N_STAGES, cluster=CLUSTER, on_change=lambda mesh: None, n_threads=N_THREADS
        ) as nodes,
        open_gateway_process(where_of(nodes, folder)) as gateway,
    ):
        async with open_connection(gateway) as connection:
            await connection.drain(DECODE_PROMPT, N_TOKENS)
        progress("settling")
        await trio.sleep(SETTLE_S)
        clocks = _clocks()
        windows: list[dict[int, float]] = []
        for number in range(runs):
            progress(f"waiting, {number + 1} of {runs}")
            windows.append(await _ms_per_s(clocks))
    totals = [sum(window.values()) for window in windows]
    n_cores = os.cpu_count() or 1
    return Result(
        name="idle",
        mesh={**median_of(totals, "ms_per_s"), "each": _by_role(clocks, windows)},
        baseline={"ms_per_s": 1e3 * n_cores, "n_cores": n_cores},
        runs=runs,
        ratio=round(sum(totals) / runs / (1e3 * n_cores), 4),
    )


def _clocks() -> dict[int, str]:
    """The roles of this process's descendants, by the clock that `time.clock_gettime` reads."""
    libc = ctypes.CDLL(None)
    clocks: dict[int, str] = {}
    for process in psutil.Process().children(recursive=True):
        role = next((role for word, role in ROLES.items() if word in process.cmdline()), None)
        clock = ctypes.c_int()
        if role is not None:
            if libc.clock_getcpuclockid(process.pid, ctypes.byref(clock)):
                raise OurError(f"the processor time of a {role} process cannot be read")
            clocks[clock.value] = role
    return clocks


async def _ms_per_s(clocks: Mapping[int, str]) -> dict[int, float]:
    before = {clock: time.clock_gettime(clock) for clock in clocks}
    begun_s = time.monotonic()
    await trio.sleep(WINDOW_S)
    passed_s = time.monotonic() - begun_s
    return {c: 1e3 * (time.clock_gettime(c) - used_s) / passed_s for c, used_s in before.items()}


def _by_role(clocks: Mapping[int, str], windows: Sequence[Mapping[int, float]]) -> Figures:
    """Milliseconds a second of one process of each role."""
    found: dict[str, list[float]] = defaultdict(list)
    for clock, role in clocks.items():
        found[role] += [window[clock] for window in windows]
    return {role: round(sum(all_ms) / len(all_ms), 2) for role, all_ms in sorted(found.items())}
