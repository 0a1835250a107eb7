"""The same generation in one llama.cpp process: what a chain's tokens are held against."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from shardmesh.coordinator.pieces import pieces_of
from shardmesh.coordinator.request import uses_history
from shardmesh.engine.base import Engine, MicroBatch, SamplingSettings
from shardmesh.errors import EngineError


@dataclasses.dataclass(frozen=True)
class Reference:
    """Tokens of a whole model, and how fast they came."""

    tokens: tuple[int, ...]
    decode_tokens_per_s: float | None


def reference_tokens(
    engine: Engine,
    prompt: Sequence[int],
    sampling: SamplingSettings,
    n_tokens: int,
    *,
    piece_tokens: int,
    adapter: str = "",
) -> Reference:
    """`n_tokens` tokens after the prompt, over the micro-batches that a coordinator would send.

    That is so with the `piece_tokens` of the manifest; others give other bits.

    `engine` holds a whole model; its sequence 0 is used.  Raises EngineError (ours).
    """
    history = prompt[-sampling.repeat_last_n :] if uses_history(sampling) else ()
    engine.open_sequence(0, sampling, history, adapter)
    tokens: list[int] = []
    times_s: list[float] = []
    waiting = list(pieces_of(prompt, piece_tokens))
    position = 0
    while len(tokens) < n_tokens:
        piece = waiting.pop(0)
        batch = MicroBatch(sequence=0, position=position, tokens=tuple(piece), sample=not waiting)
        (output,) = engine.compute([batch])
        position += len(piece)
        if waiting:
            continue
        if output.sampled is None:
            raise EngineError("the whole model sampled no token")
        tokens.append(output.sampled.token)
        times_s.append(time.perf_counter())
        waiting.append([output.sampled.token])
    engine.close_sequence(0)
    elapsed_s = times_s[-1] - times_s[0] if times_s else 0.0
    return Reference(tuple(tokens), (len(tokens) - 1) / elapsed_s if elapsed_s > 0 else None)
