"""llama.cpp with the whole model in one process, advancing all sequences in one computation."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.child import Answer, serve_requests
from benchmarks.generation import GREEDY
from benchmarks.many import N_SESSIONS
from shardmesh.engine.base import EngineOptions, MicroBatch
from shardmesh.engine.llama import load_engine
from shardmesh.engine.tokenizer import Tokenizer


def main(model: Path, tokenizer_path: Path, n_threads: int) -> None:
    """Answers each request of prompts with the seconds that all of them took."""
    options = EngineOptions(n_threads=n_threads, n_parallel=N_SESSIONS, own_kernels=False)
    engine = load_engine(model, options)
    engine.join_sequences([N_SESSIONS])

    def answer(request: Answer) -> Answer:
        started_s = time.perf_counter()
        batch = []
        for sequence, text in enumerate(request["prompts"]):
            engine.open_sequence(sequence, GREEDY)
            tokens = tuple(tokenizer.encode(text))
            batch.append(MicroBatch(sequence=sequence, position=0, tokens=tokens, sample=True))
        outputs = engine.compute(batch)
        for _ in range(request["n_tokens"] - 1):
            batch = [
                MicroBatch(
                    sequence=micro.sequence,
                    position=micro.position + micro.n_tokens,
                    tokens=(output.sampled.token,),
                    sample=True,
                )
                for micro, output in zip(batch, outputs, strict=True)
                if output.sampled is not None
            ]
            outputs = engine.compute(batch)
        return {"total_s": time.perf_counter() - started_s}

    with Tokenizer.open(tokenizer_path) as tokenizer:
        serve_requests(answer)
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
