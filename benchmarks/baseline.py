"""llama.cpp with the whole model in one process: the child that a mesh is measured against."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from benchmarks.child import Answer, Child, open_child, serve_requests
from benchmarks.generation import GREEDY, N_THREADS, Generation

LLAMA_PIECE_TOKENS: Final = 512
"""Rows that llama.cpp computes at once of a prompt unless told otherwise (n_ubatch)."""


class Baseline:
    """The running child; idle while it is not asked."""

    def __init__(self, child: Child) -> None:
        self._child = child

    async def generate(self, prompt: str, n_tokens: int, *, piece_tokens: int) -> Generation:
        """A generation that does not stop at the model's end of text.

        With the pieces of a mesh's model the prompt gives the same bits.
        """
        request = {"prompt": prompt, "n_tokens": n_tokens, "piece_tokens": piece_tokens}
        return Generation.of(await self._child.ask(request))


@asynccontextmanager
async def open_baseline(model: Path, tokenizer: Path) -> AsyncIterator[Baseline]:
    """A baseline whose model is loaded; its process is gone when the block is left."""
    async with open_child("benchmarks.baseline", str(model), str(tokenizer)) as child:
        await child.ask({})
        yield Baseline(child)


def _main(model: Path, tokenizer_path: Path) -> None:
    from shardmesh.coordinator.reference import reference_tokens
    from shardmesh.engine.base import EngineOptions
    from shardmesh.engine.llama import load_engine
    from shardmesh.engine.tokenizer import Tokenizer

    engine = load_engine(model, EngineOptions(n_threads=N_THREADS, own_kernels=False))

    def answer(request: Answer) -> Answer:
        if not request:
            return {}
        started_s = time.perf_counter()
        prompt = tokenizer.encode(request["prompt"])
        whole = reference_tokens(
            engine, prompt, GREEDY, request["n_tokens"], piece_tokens=request["piece_tokens"]
        )
        return dataclasses.asdict(
            Generation(
                n_prompt_tokens=len(prompt),
                tokens=whole.tokens,
                total_s=time.perf_counter() - started_s,
                decode_tokens_per_s=whole.decode_tokens_per_s,
            )
        )

    with Tokenizer.open(tokenizer_path) as tokenizer:
        serve_requests(answer)
    engine.close()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
