"""How a prompt is cut into micro-batches.  Pure, and the same for every prompt.

The last bits of a result depend on how many rows are computed at once (tried with f32, f16, Q8_0
and Q4_K weights on a CPU, 1 to 128 rows).  So the borders depend on positions alone: one llama.cpp
process that is fed these pieces gives the same bits as a chain, and what a session has computed of
a prompt has the bits that any other session would get for the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

PIECE_TOKENS = 32
"""Long enough for matrix products, short enough that all stages get to work on a usual prompt.

Longer ones for later positions were tried: `docs/performance.md`, "What decides the bits".
"""


def next_border(position: int) -> int:
    """Where the piece ends that begins at a position, or that it lies in."""
    return (position // PIECE_TOKENS + 1) * PIECE_TOKENS


def whole_borders(n_tokens: int) -> Iterator[int]:
    """The ends of the pieces that a prompt of so many tokens fills."""
    end = next_border(0)
    while end <= n_tokens:
        yield end
        end = next_border(end)


def pieces_of(tokens: Sequence[int], start: int = 0) -> Iterator[Sequence[int]]:
    """The prompt's tokens from `start` on, piece by piece; only the last may be cut short."""
    while start < len(tokens):
        end = min(next_border(start), len(tokens))
        yield tokens[start:end]
        start = end
