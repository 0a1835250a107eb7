"""How a prompt is cut into micro-batches.  Pure, and the same for every prompt of a model.

The last bits of a result depend on how many rows are computed at once (tried with f32, f16, Q8_0
and Q4_K weights on a CPU, 1 to 128 rows).  So the borders depend on positions alone, and on the
model, whose manifest says how long a piece is (`shards/piece_tokens.py`).  One llama.cpp process
that is fed these pieces gives the same bits as a chain, and what a session has computed of a prompt
has the bits that any other session would get for the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def whole_borders(n_tokens: int, piece_tokens: int) -> range:
    """The ends of the pieces that a prompt of so many tokens fills."""
    return range(piece_tokens, n_tokens + 1, piece_tokens)


def pieces_of(tokens: Sequence[int], piece_tokens: int, start: int = 0) -> Iterator[Sequence[int]]:
    """The prompt's tokens from `start` on, piece by piece; only the last may be cut short.

    So may the first, if `start` is not the end of a piece.
    """
    while start < len(tokens):
        end = min((start // piece_tokens + 1) * piece_tokens, len(tokens))
        yield tokens[start:end]
        start = end
