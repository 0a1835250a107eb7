"""`kernels`: Shardmesh's own kernels against ggml's, in one process, in turn.

The whole model computes single tokens of so many sequences at once, and a piece of a prompt.  Both
must give the same bits.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from benchmarks.child import Answer, open_child, serve_requests
from benchmarks.generation import N_THREADS
from benchmarks.results import Result, paired
from shardmesh.errors import EngineError

ROWS: Final = (1, 2, 4, 8)
PIECE_TOKENS: Final = 64
STEPS: Final = 24


async def measure_kernels(
    model: Path, *, runs: int, progress: Callable[[str], None]
) -> list[Result]:
    """One result for each number of rows: milliseconds of a computation, and how much sooner.

    Raises EngineError (ours) if no kernel can be used here, or they give other bits.
    """
    async with open_child("benchmarks.kernels", str(model)) as child:

        async def ask(is_with: bool, n_rows: int) -> Answer:
            answer = await child.ask({"own": is_with, "n_rows": n_rows})
            if answer["is_own"] != is_with:
                raise EngineError("no kernel can be used on this machine")
            return answer

        return [
            await compare_steps(f"kernels-{n_rows}", n_rows, ask, runs=runs, progress=progress)
            for n_rows in (*ROWS, PIECE_TOKENS)
        ]


AskStep = Callable[[bool, int], Awaitable[Answer]]
"""Has so many rows computed, with something or without it."""


async def compare_steps(
    name: str, n_rows: int, ask: AskStep, *, runs: int, progress: Callable[[str], None]
) -> Result:
    """Milliseconds of a computation with something and without, in turn, and how much sooner.

    Raises EngineError (ours) if they give other bits.
    """
    times_s: dict[bool, list[float]] = {True: [], False: []}
    for number in range(runs + 1):
        progress(f"{n_rows} rows, run {number} of {runs}" if number else "warming up")
        digests = set()
        for is_with in times_s if number % 2 else reversed(times_s):
            answer = await ask(is_with, n_rows)
            digests.add(answer["digest"])
            times_s[is_with].append(answer["step_s"])
        if len(digests) > 1:
            raise EngineError("the two ways give other bits", code="NOT_EQUAL")
    with_s, without_s = times_s[True][1:], times_s[False][1:]
    ratio, pairs = paired(without_s, with_s)
    return Result(
        name=name,
        mesh={"ms": round(1e3 * statistics.median(with_s), 2), "pair_ratios": pairs},
        baseline={"ms": round(1e3 * statistics.median(without_s), 2)},
        runs=runs,
        ratio=ratio,
    )


def _main(model: Path) -> None:
    from shardmesh.engine.base import EngineOptions, MicroBatch
    from shardmesh.engine.kernels import use_own_kernels
    from shardmesh.engine.llama import load_engine

    n_sequences = max(ROWS)
    options = EngineOptions(n_ctx=1024, n_parallel=n_sequences, n_threads=N_THREADS)
    engine = load_engine(model, options)
    engine.join_sequences(ROWS[1:])

    def answer(request: Answer) -> Answer:
        is_own = use_own_kernels(request["own"])
        n_rows = request["n_rows"]
        is_piece = n_rows > n_sequences
        lengths = [n_rows] if is_piece else [1] * n_rows
        for sequence in range(len(lengths)):
            engine.open_sequence(sequence)
        digest, times_s = hashlib.sha256(), []
        for step in range(STEPS // 4 if is_piece else STEPS):
            batch = [
                MicroBatch(
                    sequence=sequence,
                    position=step * length,
                    tokens=tuple(100 + 7 * step + sequence + i for i in range(length)),
                    want_logits=True,
                )
                for sequence, length in enumerate(lengths)
            ]
            since_s = time.perf_counter()
            outputs = engine.compute(batch)
            times_s.append(time.perf_counter() - since_s)
            for output in outputs:
                if output.logits is not None:
                    digest.update(output.logits.tobytes())
        for sequence in range(len(lengths)):
            engine.close_sequence(sequence)
        return {
            "is_own": is_own,
            "step_s": statistics.median(times_s),
            "digest": digest.hexdigest(),
        }

    serve_requests(answer)
    engine.close()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
