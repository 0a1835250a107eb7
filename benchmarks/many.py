"""`aggregate`: many sessions at once through a mesh, against the same ones batched by llama.cpp.

The baseline is as good as one process can be at this: it advances all sequences in one computation,
token after token, and nobody ever waits for anybody.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import trio

from benchmarks.child import open_child
from benchmarks.generation import N_THREADS
from benchmarks.mesh import Mesh, cut_model, open_mesh
from benchmarks.results import Result, median_of, paired

N_SESSIONS: Final = 8
N_SHARDS: Final = 2
N_TOKENS: Final = 64
PROMPTS: Final = tuple(
    f"Once upon a time there was {who} who"
    for who in (
        "a king",
        "a poor miller",
        "an old soldier",
        "a little girl",
        "a wise fox",
        "a queen",
        "a tailor",
        "a fisherman",
    )
)


async def measure_aggregate(model: Path, *, runs: int, progress: Callable[[str], None]) -> Result:
    """All tokens of N_SESSIONS sessions by the time from the first request to the last token."""
    mesh_rates: list[float] = []
    baseline_rates: list[float] = []
    async with cut_model(model, N_SHARDS, progress) as (folder, tokenizer):
        module = "benchmarks.many_baseline"
        options = ("--parallel", str(N_SESSIONS))
        async with (
            open_child(module, str(model), str(tokenizer), str(N_THREADS)) as baseline,
            open_mesh(folder, N_SHARDS, options) as mesh,
        ):
            request: dict[str, Any] = {"prompts": PROMPTS, "n_tokens": N_TOKENS}
            for number in range(runs + 1):
                progress(f"pair {number} of {runs}" if number else "warming up")
                answer = await baseline.ask(request)
                baseline_rates.append(N_SESSIONS * N_TOKENS / answer["total_s"])
                mesh_rates.append(N_SESSIONS * N_TOKENS / await _all_at_once(mesh))
    ratio, pairs = paired(mesh_rates[1:], baseline_rates[1:])
    return Result(
        name="aggregate",
        mesh={
            **median_of(mesh_rates[1:], "tokens_per_s"),
            "pair_ratios": pairs,
            "n_shards": N_SHARDS,
            "n_sessions": N_SESSIONS,
            "n_tokens": N_TOKENS,
        },
        baseline=median_of(baseline_rates[1:], "tokens_per_s"),
        runs=runs,
        ratio=ratio,
    )


async def _all_at_once(mesh: Mesh) -> float:
    """Seconds from the first request to the last token of all."""
    started_s = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for prompt in PROMPTS:
            nursery.start_soon(mesh.generate, prompt, N_TOKENS)
    return time.perf_counter() - started_s
