"""All benchmarks by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from benchmarks.against_llama import measure_decode, measure_prefill
from benchmarks.far import measure_drafts, measure_latency
from benchmarks.gateway import measure_answers, measure_idle, measure_overhead
from benchmarks.hop import measure_hops
from benchmarks.idle import measure_waiting
from benchmarks.kernels import measure_kernels
from benchmarks.large_pages import measure_large_pages
from benchmarks.load_shard import measure_load_shard
from benchmarks.many import measure_aggregate
from benchmarks.pieces import measure_pieces
from benchmarks.prefix import measure_prefix
from benchmarks.recovery import measure_recovery
from benchmarks.results import Result
from benchmarks.rpc import measure_rpc
from benchmarks.seeding import measure_seeding
from benchmarks.torrent import measure_swarm, measure_torrents
from shardmesh.wire.defaults import NICE_DEFAULT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is the same for all benchmarks of one call."""

    model: Path
    n_shards: int
    n_tokens: int
    runs: int
    n_gpu_layers: int
    progress: Callable[[str], None]


Measure = Callable[[Setting], Awaitable[list[Result]]]


async def _decode(to: Setting) -> list[Result]:
    result = await measure_decode(
        to.model, n_shards=to.n_shards, n_tokens=to.n_tokens, runs=to.runs, progress=to.progress
    )
    return [result]


async def _aggregate(to: Setting) -> list[Result]:
    return [await measure_aggregate(to.model, runs=to.runs, progress=to.progress)]


async def _prefill(to: Setting) -> list[Result]:
    return [await measure_prefill(to.model, runs=to.runs, progress=to.progress)]


async def _pieces(to: Setting) -> list[Result]:
    return await measure_pieces(
        to.model,
        n_shards=to.n_shards,
        n_gpu_layers=to.n_gpu_layers,
        runs=to.runs,
        progress=to.progress,
    )


async def _kernels(to: Setting) -> list[Result]:
    return await measure_kernels(to.model, runs=to.runs, progress=to.progress)


async def _large_pages(to: Setting) -> list[Result]:
    return await measure_large_pages(to.model, runs=to.runs, progress=to.progress)


async def _prefix(to: Setting) -> list[Result]:
    return [await measure_prefix(to.model, runs=to.runs, progress=to.progress)]


async def _drafts(to: Setting) -> list[Result]:
    result = await measure_drafts(
        to.model, n_shards=to.n_shards, n_tokens=to.n_tokens, runs=to.runs, progress=to.progress
    )
    return [result]


async def _latency(to: Setting) -> list[Result]:
    return [await measure_latency(to.model, runs=to.runs, progress=to.progress)]


async def _hop(to: Setting) -> list[Result]:
    return await measure_hops(runs=to.runs, progress=to.progress)


async def _idle(to: Setting) -> list[Result]:
    return [await measure_waiting(to.model, runs=to.runs, progress=to.progress)]


async def _recovery(to: Setting) -> list[Result]:
    return await measure_recovery(to.model, runs=to.runs, progress=to.progress)


async def _torrent(to: Setting) -> list[Result]:
    return await measure_torrents(runs=to.runs, progress=to.progress)


async def _swarm(to: Setting) -> list[Result]:
    return await measure_swarm(runs=to.runs, progress=to.progress)


async def _load_shard(to: Setting) -> list[Result]:
    return [await measure_load_shard(runs=to.runs, progress=to.progress)]


async def _seeding(to: Setting) -> list[Result]:
    return [await measure_seeding(to.model, runs=to.runs, progress=to.progress)]


async def _gateway(to: Setting) -> list[Result]:
    return await measure_overhead(
        to.model, n_shards=to.n_shards, n_tokens=to.n_tokens, runs=to.runs, progress=to.progress
    )


async def _gateway_idle(to: Setting) -> list[Result]:
    return [await measure_idle(to.model, progress=to.progress)]


async def _gateway_p99(to: Setting) -> list[Result]:
    return [
        await measure_answers(to.model, nice=nice, progress=to.progress)
        for nice in (NICE_DEFAULT, 0)
    ]


def _by_rpc(name: str) -> Measure:
    async def measure(to: Setting) -> list[Result]:
        return [await measure_rpc(name, to.model, runs=to.runs, progress=to.progress)]

    return measure


BENCHMARKS: Final[dict[str, Measure]] = {
    "decode": _decode,
    "aggregate": _aggregate,
    "prefill": _prefill,
    "pieces": _pieces,
    "kernels": _kernels,
    "large-pages": _large_pages,
    "prefix": _prefix,
    "drafts": _drafts,
    "latency": _latency,
    "hop": _hop,
    "idle": _idle,
    "recovery": _recovery,
    "torrent": _torrent,
    "swarm": _swarm,
    "load-shard": _load_shard,
    "seeding": _seeding,
    "gateway": _gateway,
    "gateway-idle": _gateway_idle,
    "gateway-p99": _gateway_p99,
}

BY_RPC: Final[dict[str, Measure]] = {
    name: _by_rpc(name) for name in ("decode", "aggregate", "prefill")
}
"""With `--rpc`: what llama.cpp's own RPC backend makes of the same."""
