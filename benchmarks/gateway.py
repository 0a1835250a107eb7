"""`gateway`, `gateway-idle`, `gateway-p99`: what the way over HTTP costs beside the library.

The library path is what `shardmesh run` does, in this process; the gateway is a process of its own.
Both use the same mesh, in turn.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import psutil
import trio

from benchmarks.gateway_process import GatewayProcess, open_connection, open_gateway_process
from benchmarks.generation import DECODE_PROMPT, Generation
from benchmarks.mesh import Mesh, cut_model, open_mesh
from benchmarks.results import Result, median_of, paired
from benchmarks.websocket import Onlooker, open_onlooker
from shardmesh.confinement import allow_files
from shardmesh.wire.defaults import NICE_DEFAULT

Progress = Callable[[str], None]

N_ONLOOKERS: Final = 1000
OPENING_AT_ONCE: Final = 20
SETTLE_S: Final = 2.0

N_STREAMS: Final = 8
STREAM_TOKENS: Final = 64
N_QUESTIONS: Final = 200
QUESTION_PAUSE_S: Final = 0.01
PATHS: Final = ("/v1/node/info", "/v1/node/status", "/v1/peers")


async def measure_overhead(
    model: Path, *, n_shards: int, n_tokens: int, runs: int, progress: Progress
) -> list[Result]:
    """Pieces of text per second and the time to the first one of one session, on both ways."""
    over_http: list[Generation] = []
    by_library: list[Generation] = []
    async with (
        _gateway(model, n_shards, (), progress) as (mesh, gateway),
        open_connection(gateway) as connection,
    ):
        for number in range(runs + 1):
            progress(f"pair {number} of {runs}" if number else "warming up")
            if number % 2:
                over_http.append(await connection.complete(DECODE_PROMPT, n_tokens))
            by_library.append(await mesh.generate(DECODE_PROMPT, n_tokens))
            if not number % 2:
                over_http.append(await connection.complete(DECODE_PROMPT, n_tokens))
    return _overhead(over_http[1:], by_library[1:], n_shards=n_shards, n_tokens=n_tokens)


def _overhead(
    over_http: list[Generation], by_library: list[Generation], *, n_shards: int, n_tokens: int
) -> list[Result]:
    ours = [generation.pieces_per_s for generation in over_http]
    theirs = [generation.pieces_per_s for generation in by_library]
    ratio, pairs = paired(ours, theirs)
    ours_ms = [1e3 * generation.text_s[0] for generation in over_http]
    theirs_ms = [1e3 * generation.text_s[0] for generation in by_library]
    added_ms = [round(a - b, 3) for a, b in zip(ours_ms, theirs_ms, strict=True)]
    size = {"n_shards": n_shards, "n_tokens": n_tokens}
    runs = len(over_http)
    return [
        Result(
            name="gateway",
            mesh={**median_of(ours, "pieces_per_s"), "pair_ratios": pairs, **size},
            baseline=median_of(theirs, "pieces_per_s"),
            runs=runs,
            ratio=ratio,
        ),
        Result(
            name="gateway-first-token",
            mesh={**median_of(ours_ms, "ms"), "added_ms": added_ms, **size},
            baseline=median_of(theirs_ms, "ms"),
            runs=runs,
            ms=round(statistics.median(added_ms), 3),
        ),
    ]


async def measure_idle(model: Path, *, progress: Progress) -> Result:
    """Memory of a gateway with N_ONLOOKERS idle WebSockets, against the same one without."""
    allow_files()
    async with _gateway(model, 2, (), progress) as (_, gateway):
        process = psutil.Process(gateway.pid)
        async with _onlookers(gateway, 1):
            await trio.sleep(SETTLE_S)
            before = process.memory_info().rss
            progress(f"{N_ONLOOKERS} WebSockets")
            async with _onlookers(gateway, N_ONLOOKERS):
                await trio.sleep(SETTLE_S)
                after = process.memory_info().rss
    return Result(
        name="gateway-idle",
        mesh={"grown_mb": round((after - before) / 1e6, 1), "n_websockets": N_ONLOOKERS},
        baseline={"rss_mb": round(before / 1e6, 1)},
        runs=1,
        ratio=round(after / before, 3),
    )


async def measure_answers(model: Path, *, nice: int = NICE_DEFAULT, progress: Progress) -> Result:
    """How long short questions take while N_STREAMS answers are streamed, and while none is.

    By `nice` the listeners stand back behind the gateway, which is on the same machine.
    """
    options = ("--parallel", str(N_STREAMS), "--nice", str(nice))
    async with _gateway(model, 2, options, progress) as (_, gateway):
        progress("at rest")
        at_rest = await _ask_questions(gateway)
        progress(f"{N_STREAMS} streams")
        async with trio.open_nursery() as nursery:
            for _ in range(N_STREAMS):
                nursery.start_soon(_stream_on, gateway)
            await trio.sleep(SETTLE_S)
            busy = await _ask_questions(gateway)
            nursery.cancel_scope.cancel()
    p99_ms = {path: _percentile_ms(times, 99) for path, times in busy.items()}
    return Result(
        name="gateway-p99" if nice == NICE_DEFAULT else f"gateway-p99-nice-{nice}",
        mesh={
            "p99_ms": max(p99_ms.values()),
            "by_path": p99_ms,
            "median_ms": {path: _percentile_ms(times, 50) for path, times in busy.items()},
            "n_streams": N_STREAMS,
            "n_questions": N_QUESTIONS,
        },
        baseline={"p99_ms": max(_percentile_ms(times, 99) for times in at_rest.values())},
        runs=1,
        ms=max(p99_ms.values()),
    )


async def _ask_questions(gateway: GatewayProcess) -> dict[str, list[float]]:
    """Seconds of each answer, by path."""
    times: dict[str, list[float]] = {path: [] for path in PATHS}
    async with open_connection(gateway) as connection:
        for _ in range(N_QUESTIONS):
            for path in PATHS:
                times[path].append(await connection.get(path))
                await trio.sleep(QUESTION_PAUSE_S)
    return times


async def _stream_on(gateway: GatewayProcess) -> None:
    """One answer after the other, until cancelled."""
    async with open_connection(gateway) as connection:
        while True:
            await connection.drain(DECODE_PROMPT, STREAM_TOKENS)


@asynccontextmanager
async def _gateway(
    model: Path, n_shards: int, listen_options: tuple[str, ...], progress: Progress
) -> AsyncIterator[tuple[Mesh, GatewayProcess]]:
    """A mesh of the model, and a gateway that has joined it."""
    async with (
        cut_model(model, n_shards, progress) as (folder, _),
        open_mesh(folder, n_shards, listen_options) as mesh,
        open_gateway_process(mesh.where) as gateway,
    ):
        yield mesh, gateway


@asynccontextmanager
async def _onlookers(gateway: GatewayProcess, n: int) -> AsyncIterator[None]:
    """WebSockets that have had their greeting and the first state."""
    found: list[Onlooker] = []
    at_once = trio.CapacityLimiter(OPENING_AT_ONCE)

    async def open_one() -> None:
        async with at_once:
            found.append(onlooker := await open_onlooker(gateway.port))
            for _ in range(2):
                await onlooker.next()

    async with trio.open_nursery() as nursery:
        for _ in range(n):
            nursery.start_soon(open_one)
    try:
        yield
    finally:
        for onlooker in found:
            await onlooker.aclose()


def _percentile_ms(times_s: list[float], percent: int) -> float:
    """The time that so many of a hundred do not exceed."""
    ordered = sorted(times_s)
    return round(1e3 * ordered[math.ceil(len(ordered) * percent / 100) - 1], 3)
