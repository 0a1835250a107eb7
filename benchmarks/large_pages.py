"""`large-pages`: weights and KV in pages of 2 MB against such of 4 KB, in two processes, in turn.

Both compute the whole model with Shardmesh's kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.child import Answer, open_child
from benchmarks.kernels import compare_steps
from benchmarks.results import Result
from shardmesh.engine.large_pages import environment_for

ROWS: Final = (1, 8)


async def measure_large_pages(
    model: Path, *, runs: int, progress: Callable[[str], None]
) -> list[Result]:
    """One result for each number of sequences that get a token at once: milliseconds of it.

    Raises EngineError (ours) if the pages change a bit.
    """
    large = environment_for(os.environ)
    async with (
        open_child("benchmarks.kernels", str(model)) as with_small,
        open_child("benchmarks.kernels", str(model), environment=large) as with_large,
    ):

        async def ask(is_large: bool, n_rows: int) -> Answer:
            child = with_large if is_large else with_small
            return await child.ask({"own": True, "n_rows": n_rows})

        return [
            await compare_steps(f"large-pages-{n_rows}", n_rows, ask, runs=runs, progress=progress)
            for n_rows in ROWS
        ]
