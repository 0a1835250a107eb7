"""Embeddings: what the last stage makes of a whole text, over the same sessions as tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shardmesh.coordinator.pieces import pieces_of
from shardmesh.coordinator.session import N_BATCHES_IN_FLIGHT_MAX, Session
from shardmesh.engine.base import SamplingSettings
from shardmesh.errors import ProtocolError
from shardmesh.wire.messages import BatchDone

EMBEDDING_TOKENS = 512
"""Tokens of one micro-batch, llama.cpp's own number (n_ubatch) and as many as an engine takes.

The same for all models, since one that pools over all tokens must have them at once; and it decides
the last bits."""

UNUSED_SAMPLING = SamplingSettings(temperature=0.0)
"""The last stage is opened with a sampler in any case."""


@dataclasses.dataclass(frozen=True)
class Embedding:
    """What stands for one text."""

    values: npt.NDArray[np.float32]  # (n_embd,), as llama.cpp gives them, of any length
    n_tokens: int

    def unit(self) -> npt.NDArray[np.float32]:
        """The values as a vector of length 1, computed as llama.cpp's server does; 0 stays 0."""
        length = float(np.sqrt(np.square(self.values.astype(np.float64)).sum()))
        return self.values * np.float32(1.0 / length if length > 0 else 0.0)


async def embed_tokens(session: Session, tokens: Sequence[int]) -> Embedding:
    """The embedding of a text whose tokens an empty session gets.

    It was opened with pieces of EMBEDDING_TOKENS.  Raises what the session raises, and InputError
    (theirs) for more tokens than the model's kind of pooling can take.
    """
    pieces = list(pieces_of(tokens, session.piece_tokens))
    n_in_flight = 0
    done: BatchDone | None = None
    for number, piece in enumerate(pieces):
        if n_in_flight == N_BATCHES_IN_FLIGHT_MAX:
            await session.receive()
            n_in_flight -= 1
        session.send(piece, sample=False, embed=number == len(pieces) - 1)
        n_in_flight += 1
    for _ in range(n_in_flight):
        done = await session.receive()
    if done is None or not done.embedding:
        raise ProtocolError("the last stage gave no embedding")
    return Embedding(done.embedding_values(), len(tokens))
