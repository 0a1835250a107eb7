"""`large-pages`: weights and KV in pages of 2 MB against such of 4 KB, in two processes, in turn.

Both compute the whole model with Shardmesh's kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.child import open_child
from benchmarks.kernels import step_result
from benchmarks.results import Result
from shardmesh.engine.large_pages import environment_for

ROWS: Final = (1, 8)


async def measure_large_pages(
    model: Path, *, runs: int, progress: Callable[[str], None]
) -> list[Result]:
    """One result for each number of sequences that get a token at once: milliseconds of it."""
    large = environment_for(os.environ)
    async with (
        open_child("benchmarks.kernels", str(model)) as with_small,
        open_child("benchmarks.kernels", str(model), environment=large) as with_large,
    ):
        results = []
        for n_rows in ROWS:
            times_s: dict[bool, list[float]] = {True: [], False: []}
            for number in range(runs + 1):
                progress(f"{n_rows} rows, run {number} of {runs}" if number else "warming up")
                for is_large in times_s if number % 2 else reversed(times_s):
                    child = with_large if is_large else with_small
                    answer = await child.ask({"own": True, "n_rows": n_rows})
                    times_s[is_large].append(answer["step_s"])
            results.append(
                step_result(f"large-pages-{n_rows}", times_s[True][1:], times_s[False][1:], runs)
            )
    return results
