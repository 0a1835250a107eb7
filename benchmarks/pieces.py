"""`pieces`: what pieces of each length cost one stage, and how fast that makes a chain.

A shard of the model computes the same prompt in pieces of each length.  From these times follows
when a chain of such stages is done, without hops and with a core for each, and how much sooner that
is than one process that computes all of them in pieces of 512, which suits one process best.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from benchmarks.baseline import LLAMA_PIECE_TOKENS
from benchmarks.child import Answer, Child, open_child, serve_requests
from benchmarks.generation import N_THREADS
from benchmarks.mesh import cut_model
from benchmarks.results import Result, median_of
from shardmesh.shards.gguf_check import read_gguf
from shardmesh.shards.names import shard_name
from shardmesh.shards.piece_tokens import legal_numbers

PROMPT_TOKENS: Final = 2048
SHORT_TOKENS: Final = 256
"""Of a prompt with which long pieces do not keep many stages busy."""

STAGES: Final = (2, 4, 8)


async def measure_pieces(
    model: Path, *, n_shards: int, n_gpu_layers: int, runs: int, progress: Callable[[str], None]
) -> list[Result]:
    """One result for each length that pieces may have: milliseconds of a piece in the stage.

    `n_gpu_layers` of the shard are on graphics processors, -1 for all.
    """
    async with cut_model(model, n_shards, progress) as (folder, _):
        shard = folder / "shards" / shard_name(0)
        async with open_child("benchmarks.pieces", str(shard), str(n_gpu_layers)) as stage:
            n_tokens = (await stage.ask({}))["n_tokens"]
            sweeps = await _sweep(stage, runs, progress)
    typical = {
        length: [statistics.median(times) for times in zip(*all_s, strict=True)]
        for length, all_s in sweeps.items()
    }
    rates = {
        length: median_of([n_tokens / sum(times) for times in all_s], "tokens_per_s")
        for length, all_s in sweeps.items()
    }
    results = []
    for length, piece_s in typical.items():
        figures = {
            **rates[length],
            "n_shards": n_shards,
            "n_gpu_layers": n_gpu_layers,
            "n_tokens": n_tokens,
            "ms_of_pieces": [round(1e3 * each, 2) for each in piece_s],
        }
        results.append(
            Result(
                name=f"pieces-{length}",
                mesh=figures,
                baseline=rates[LLAMA_PIECE_TOKENS],
                runs=runs,
                ms=round(1e3 * statistics.mean(piece_s), 3),
                derived=_speed_ups(typical, length, n_tokens),
            )
        )
    return results


def chain_s(piece_s: Sequence[float], n_stages: int) -> float:
    """When the last of equal stages is done with a prompt whose pieces take each so long."""
    left_s = [0.0] * len(piece_s)  # when each piece leaves the stage before
    for _ in range(n_stages):
        free_s = 0.0
        for number, needed_s in enumerate(piece_s):
            free_s = left_s[number] = max(free_s, left_s[number]) + needed_s
    return left_s[-1]


def speed_up(piece_s: Sequence[float], whole_s: float, n_stages: int) -> float:
    """How much sooner a chain is than one process that needs `whole_s` for a stage's layers."""
    return n_stages * whole_s / chain_s(piece_s, n_stages)


def _speed_ups(typical: dict[int, list[float]], length: int, n_tokens: int) -> dict[str, float]:
    """For a long prompt and a short one, which one process computes in one piece."""
    piece_s, whole_s = typical[length], sum(typical[LLAMA_PIECE_TOKENS])
    found = {f"{n} stages": round(speed_up(piece_s, whole_s, n), 2) for n in STAGES}
    if n_tokens > SHORT_TOKENS:
        in_short = typical[min(length, SHORT_TOKENS)][: max(1, SHORT_TOKENS // length)]
        short_s = typical[SHORT_TOKENS][0]
        for n in STAGES:
            found[f"{n} short"] = round(speed_up(in_short, short_s, n), 2)
    return found


async def _sweep(
    stage: Child, runs: int, progress: Callable[[str], None]
) -> dict[int, list[list[float]]]:
    """By length the seconds of all pieces, run by run; the first run warms up."""
    sweeps: dict[int, list[list[float]]] = {length: [] for length in legal_numbers()}
    for number in range(runs + 1):
        for length in sweeps if number % 2 else reversed(sweeps):
            progress(f"run {number} of {runs}, pieces of {length}" if number else "warming up")
            answer = await stage.ask({"piece_tokens": length})
            if number:
                sweeps[length].append(answer["piece_s"])
    return sweeps


def _main(shard: Path, n_gpu_layers: int) -> None:
    from shardmesh.coordinator.pieces import pieces_of
    from shardmesh.engine.base import EngineOptions, MicroBatch
    from shardmesh.engine.llama import load_engine

    gguf = read_gguf(shard)
    n_tokens = min(PROMPT_TOKENS, gguf.get_int(f"{gguf.architecture}.context_length"))
    options = EngineOptions(
        n_ctx=n_tokens, n_parallel=1, n_threads=N_THREADS, n_gpu_layers=n_gpu_layers
    )
    engine = load_engine(shard, options)
    prompt = [(7919 * i + 13) % engine.info.n_vocab for i in range(n_tokens)]

    def answer(request: Answer) -> Answer:
        if not request:
            return {"n_tokens": n_tokens}
        engine.open_sequence(0)
        piece_s: list[float] = []
        position = 0
        for piece in pieces_of(prompt, request["piece_tokens"]):
            batch = [MicroBatch(sequence=0, position=position, tokens=tuple(piece))]
            since_s = time.perf_counter()
            engine.compute(batch)
            piece_s.append(time.perf_counter() - since_s)
            position += len(piece)
        return {"piece_s": piece_s}

    serve_requests(answer)
    engine.close()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
