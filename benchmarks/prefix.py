"""`prefix`: how long the first token of a prompt takes whose beginning was computed before.

Each pair of prompts begins in its own way, so that the first of them finds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from benchmarks.generation import long_prompt
from benchmarks.mesh import Mesh, cut_model, open_mesh
from benchmarks.results import Result, median_of, paired
from shardmesh.errors import OurError

N_SHARDS: Final = 2
SHARED_TOKENS: Final = 1500
FIRST_END: Final = " And the queen said"
SECOND_END: Final = " But nobody had seen the wolf"
CHECKED_TOKENS: Final = 8


async def measure_prefix(model: Path, *, runs: int, progress: Callable[[str], None]) -> Result:
    """Seconds to the first token: of the second prompt (mesh) and of the first (baseline)."""
    first_s: list[float] = []
    second_s: list[float] = []
    async with (
        cut_model(model, N_SHARDS, progress) as (folder, tokenizer),
        open_mesh(folder, N_SHARDS) as mesh,
    ):
        for number in range(runs + 1):
            progress(f"pair {number} of {runs}" if number else "warming up")
            shared = await trio.to_thread.run_sync(
                long_prompt, tokenizer, SHARED_TOKENS, f"Tale {number}. "
            )
            first_s.append(await _first_token_s(mesh, shared + FIRST_END))
            second_s.append(await _first_token_s(mesh, shared + SECOND_END))
            if number == 0:
                await _check(mesh, shared + SECOND_END)
        timings = mesh.timings[-1]
    ratio, pairs = paired(second_s[1:], first_s[1:])
    return Result(
        name="prefix",
        mesh={
            **median_of(second_s[1:], "s"),
            "pair_ratios": pairs,
            "n_shards": N_SHARDS,
            "n_prompt_tokens": timings.n_prompt_tokens,
            "n_reused_tokens": timings.n_reused_tokens,
        },
        baseline=median_of(first_s[1:], "s"),
        runs=runs,
        ratio=ratio,
    )


async def _first_token_s(mesh: Mesh, prompt: str) -> float:
    await mesh.generate(prompt, 1, reuse_prefix=True)
    return mesh.timings[-1].first_token_s


async def _check(mesh: Mesh, prompt: str) -> None:
    """Raises OurError unless what is reused changes nothing."""
    reused = await mesh.generate(prompt, CHECKED_TOKENS, reuse_prefix=True)
    if not mesh.timings[-1].n_reused_tokens:
        raise OurError("nothing was reused", code="NOT_REUSED")
    if reused.tokens != (await mesh.generate(prompt, CHECKED_TOKENS)).tokens:
        raise OurError("a reused prefix gave other tokens", code="NOT_EQUAL")
