"""`drafts` and `latency`: a mesh whose hops take longer, against itself.

`drafts`: one session whose text repeats itself, with guesses and without, in turn.
`latency`: many sessions, with long hops and short ones, in turn.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from benchmarks.generation import DECODE_PROMPT, GREEDY, Generation
from benchmarks.long_line import LongLine, listen_options, open_line
from benchmarks.many import PROMPTS
from benchmarks.mesh import Mesh, cut_model, open_mesh
from benchmarks.results import Result, median_of, paired
from shardmesh.cli.demo_mesh import free_port
from shardmesh.errors import OurError

Progress = Callable[[str], None]

DRAFTS_DELAY_S: Final = 0.025
REPEATING: Final = dataclasses.replace(GREEDY, presence_penalty=-6.0, repeat_last_n=16)
"""A model with random weights does not quote.  This makes it take up one of its last tokens again:
it goes in circles, which change now and then, and most guesses come true, as where one copies."""

LATENCY_DELAY_S: Final = 0.05
LATENCY_SHARDS: Final = 3
LATENCY_SESSIONS: Final = 32
LATENCY_TOKENS: Final = 64
LATENCY_OPTIONS: Final = ("--parallel", str(LATENCY_SESSIONS), "--ctx-size", "256")


async def measure_drafts(
    model: Path, *, n_shards: int, n_tokens: int, runs: int, progress: Progress
) -> Result:
    """Tokens per second of one session over long hops, guesses on by guesses off."""
    guessed: list[Generation] = []
    alone: list[Generation] = []
    async with _far_mesh(model, n_shards, (), progress) as (mesh, line):
        await line.delay(DRAFTS_DELAY_S)
        for number in range(runs + 1):
            progress(f"pair {number} of {runs}" if number else "warming up")
            sides = [(alone, 0), (guessed, None)]
            for found, n_drafts in sides if number % 2 else reversed(sides):
                found.append(
                    await mesh.generate(
                        DECODE_PROMPT, n_tokens, sampling=REPEATING, n_drafts=n_drafts
                    )
                )
            if alone[-1].tokens != guessed[-1].tokens:
                raise OurError("another text was written with drafts", code="NOT_EQUAL")
        timings = [each for each in mesh.timings if each.n_drafts][-1]
    rates = [[each.decode_tokens_per_s or 0.0 for each in side[1:]] for side in (guessed, alone)]
    ratio, pairs = paired(*rates)
    return Result(
        name="drafts",
        mesh={
            **median_of(rates[0], "tokens_per_s"),
            "pair_ratios": pairs,
            "n_shards": n_shards,
            "n_tokens": n_tokens,
            "hop_delay_ms": DRAFTS_DELAY_S * 1e3,
            "n_drafts": timings.n_drafts,
            "n_drafts_right": timings.n_drafts_right,
        },
        baseline=median_of(rates[1], "tokens_per_s"),
        runs=runs,
        ratio=ratio,
    )


async def measure_latency(model: Path, *, runs: int, progress: Progress) -> Result:
    """All tokens of many sessions by the time that they took, long hops by short ones."""
    rates: dict[float, list[float]] = {LATENCY_DELAY_S: [], 0.0: []}
    async with _far_mesh(model, LATENCY_SHARDS, LATENCY_OPTIONS, progress) as (mesh, line):
        for number in range(runs + 1):
            progress(f"pair {number} of {runs}" if number else "warming up")
            for delay_s in rates if number % 2 else reversed(rates):
                await line.delay(delay_s)
                rates[delay_s].append(await _rate_of_all(mesh))
    far, near = rates[LATENCY_DELAY_S][1:], rates[0.0][1:]
    ratio, pairs = paired(far, near)
    return Result(
        name="latency",
        mesh={
            **median_of(far, "tokens_per_s"),
            "pair_ratios": pairs,
            "n_shards": LATENCY_SHARDS,
            "n_sessions": LATENCY_SESSIONS,
            "n_tokens": LATENCY_TOKENS,
            "hop_delay_ms": LATENCY_DELAY_S * 1e3,
        },
        baseline=median_of(near, "tokens_per_s"),
        runs=runs,
        ratio=ratio,
    )


async def _rate_of_all(mesh: Mesh) -> float:
    """Tokens of all sessions per second, from the first request to the last token."""
    started_s = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for number in range(LATENCY_SESSIONS):
            prompt = f"{PROMPTS[number % len(PROMPTS)]} {number}"
            nursery.start_soon(mesh.generate, prompt, LATENCY_TOKENS)
    return LATENCY_SESSIONS * LATENCY_TOKENS / (time.perf_counter() - started_s)


@asynccontextmanager
async def _far_mesh(
    model: Path, n_shards: int, options: tuple[str, ...], progress: Progress
) -> AsyncIterator[tuple[Mesh, LongLine]]:
    """A mesh whose links all go through one line."""
    async with cut_model(model, n_shards, progress) as (folder, _):
        ports = [free_port() for _ in range(n_shards)]

        def options_of(shard_id: int) -> tuple[str, ...]:
            return (*options, *listen_options(shard_id, ports[shard_id]))

        async with (
            open_line(ports) as line,
            open_mesh(folder, n_shards, options_of=options_of) as mesh,
        ):
            yield mesh, line
