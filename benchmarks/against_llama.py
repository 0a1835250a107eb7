"""`decode` and `prefill`: a mesh and one llama.cpp process, in turn, over the same prompt.

Both are up all the time, and the one that is not measured is idle.  The first pair warms up and is
thrown away; then the order changes from pair to pair, so that neither side always comes first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from benchmarks.baseline import LLAMA_PIECE_TOKENS, Baseline, open_baseline
from benchmarks.generation import DECODE_PROMPT, Generation, long_prompt
from benchmarks.mesh import Mesh, cut_model, open_mesh
from benchmarks.results import Figures, Result, median_of, paired
from shardmesh.coordinator.timings import Timings
from shardmesh.errors import OurError
from shardmesh.shards.manifest import MANIFEST_NAME, read_manifest

Progress = Callable[[str], None]

PREFILL_TOKENS: Final = 2048
PREFILL_SHARDS: Final = 2


@dataclasses.dataclass(frozen=True)
class Sides:
    """Both sides, ready."""

    mesh: Mesh
    baseline: Baseline
    tokenizer: Path
    piece_tokens: int  # of a prompt in the mesh

    async def alternate(
        self, prompt: str, n_tokens: int, runs: int, progress: Progress, *, own_pieces: bool = False
    ) -> tuple[list[Generation], list[Generation]]:
        """`runs` generations of each side; raises OurError if the tokens are not the same.

        With `own_pieces` llama.cpp cuts the prompt as it does by itself, and writes what it will.
        """
        piece_tokens = LLAMA_PIECE_TOKENS if own_pieces else self.piece_tokens
        theirs_of = functools.partial(self.baseline.generate, piece_tokens=piece_tokens)
        ours: list[Generation] = []
        theirs: list[Generation] = []
        for number in range(runs + 1):
            progress(f"pair {number} of {runs}" if number else "warming up")
            if number % 2:
                ours.append(await self.mesh.generate(prompt, n_tokens))
                theirs.append(await theirs_of(prompt, n_tokens))
            else:
                theirs.append(await theirs_of(prompt, n_tokens))
                ours.append(await self.mesh.generate(prompt, n_tokens))
            if ours[-1].tokens != theirs[-1].tokens and not own_pieces:
                raise OurError("the mesh and llama.cpp wrote different tokens", code="NOT_EQUAL")
        return ours[1:], theirs[1:]


async def measure_decode(
    model: Path, *, n_shards: int, n_tokens: int, runs: int, progress: Progress
) -> Result:
    """Tokens per second of one session, after the first token."""
    async with _open_sides(model, n_shards, progress) as sides:
        ours, theirs = await sides.alternate(DECODE_PROMPT, n_tokens, runs, progress)
        timings = sides.mesh.timings[1:]
    mesh = [generation.decode_tokens_per_s or 0.0 for generation in ours]
    baseline = [generation.decode_tokens_per_s or 0.0 for generation in theirs]
    ratio, pairs = paired(mesh, baseline)
    return Result(
        name="decode",
        mesh={
            **median_of(mesh, "tokens_per_s"),
            "pair_ratios": pairs,
            "n_shards": n_shards,
            "n_tokens": n_tokens,
            "ms_per_token": _where_the_time_went(timings),
        },
        baseline=median_of(baseline, "tokens_per_s"),
        runs=runs,
        ratio=ratio,
    )


async def measure_prefill(model: Path, *, runs: int, progress: Progress) -> Result:
    """Prompt tokens by the time from the request to the first token.

    llama.cpp has the prompt in its own pieces, which suit one process best.
    """
    async with _open_sides(model, PREFILL_SHARDS, progress) as sides:
        prompt = await trio.to_thread.run_sync(long_prompt, sides.tokenizer, PREFILL_TOKENS)
        ours, theirs = await sides.alternate(prompt, 1, runs, progress, own_pieces=True)
        piece_tokens = sides.piece_tokens
    mesh = [generation.prefill_tokens_per_s for generation in ours]
    baseline = [generation.prefill_tokens_per_s for generation in theirs]
    ratio, pairs = paired(mesh, baseline)
    return Result(
        name="prefill",
        mesh={
            **median_of(mesh, "tokens_per_s"),
            "pair_ratios": pairs,
            "n_shards": PREFILL_SHARDS,
            "n_prompt_tokens": ours[0].n_prompt_tokens,
            "piece_tokens": piece_tokens,
        },
        baseline=median_of(baseline, "tokens_per_s"),
        runs=runs,
        ratio=ratio,
    )


@asynccontextmanager
async def _open_sides(model: Path, n_shards: int, progress: Progress) -> AsyncIterator[Sides]:
    async with (
        cut_model(model, n_shards, progress) as (folder, tokenizer),
        open_baseline(model, tokenizer) as baseline,
        open_mesh(folder, n_shards) as mesh,
    ):
        manifest = await trio.to_thread.run_sync(read_manifest, folder / "shards" / MANIFEST_NAME)
        yield Sides(mesh, baseline, tokenizer, manifest.piece_tokens)


def _where_the_time_went(timings: list[Timings]) -> Figures:
    """Mean milliseconds of a token: in the stages' engines, in their queues, on the way."""
    n_tokens = max(1, sum(t.n_tokens - 1 for t in timings))
    stages = [stage for t in timings for stage in t.stages]
    hops_ms = sum(stage.wire_ms for stage in stages) + sum(t.first_hop_ms for t in timings)
    return {
        "compute": round(sum(stage.compute_ms for stage in stages) / n_tokens, 3),
        "queue": round(sum(stage.queue_ms for stage in stages) / n_tokens, 3),
        "wire": round(hops_ms / n_tokens, 3),
    }
