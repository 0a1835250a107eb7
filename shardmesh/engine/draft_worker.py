"""The process of a draft model: says which token it would write next, greedily; see `draft_model`.

Lines of JSON: first the process says `{"error": ...}`, empty if the model is loaded.  Then it
answers `{"n_keep": ..., "tokens": [...]}` with `{"token": ...}`, null where it cannot go on.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from shardmesh.engine.base import Engine, EngineOptions, MicroBatch, SamplingSettings
from shardmesh.engine.llama import load_engine
from shardmesh.errors import ShardmeshError

GREEDY = SamplingSettings(temperature=0.0)


def main(path: Path, n_threads: int) -> None:
    """Answers requests from standard input until it ends."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what a library prints must not end up among the answers
        try:
            engine = load_engine(path, EngineOptions(n_parallel=1, n_threads=n_threads))
            engine.open_sequence(0, GREEDY)
        except ShardmeshError as error:
            _say(answers, {"error": str(error)})
            return
        _say(answers, {"error": ""})
        for line in sys.stdin:
            request = json.loads(line)
            token = _next_token(engine, request["n_keep"], request["tokens"])
            _say(answers, {"token": token})


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _next_token(engine: Engine, n_keep: int, tokens: list[int]) -> int | None:
    """What comes behind what the sequence holds up to `n_keep` and these tokens."""
    token = None
    try:
        engine.trim_sequence(0, n_keep)
        size = engine.info.n_batch_tokens_max
        for start in range(0, len(tokens), size):
            piece = tuple(tokens[start : start + size])
            is_last = start + size >= len(tokens)
            batch = MicroBatch(sequence=0, position=n_keep + start, tokens=piece, sample=is_last)
            (output,) = engine.compute([batch])
            token = output.sampled.token if output.sampled is not None else None
    except ShardmeshError as error:
        sys.stderr.write(f"the draft model cannot go on: {error}\n")
        engine.open_sequence(0, GREEDY)
        return None
    return token


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
