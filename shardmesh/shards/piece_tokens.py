"""How many tokens the pieces have that a model's prompts go through in: chosen when it is split.

It is a property of the split model, in its manifest: the length of the pieces decides the last bits
of what is computed, so it must be the same for all who use the model, or nothing could be reused.
"""

from __future__ import annotations

from typing import Final

from shardmesh.errors import InputError
from shardmesh.wire.limits import PIECE_BYTES_MAX, PIECE_TOKENS_MAX, PIECE_TOKENS_MIN

AUTO: Final = None

PIECE_TOKENS_OF_TWO: Final = 64
"""For one or two stages, which hardly wait for each other.  Pieces of 128 would bring one percent
more, and keep the tokens of other sessions waiting for twice as long."""

PIECE_TOKENS_OF_MANY: Final = 32
"""Long enough for matrix products, short enough that many stages get to work on a usual prompt.

Measured: `docs/performance.md`, "How long a piece is".
"""


def auto_piece_tokens(n_shards: int) -> int:
    """What suits stages with ordinary processors."""
    return PIECE_TOKENS_OF_TWO if n_shards <= 2 else PIECE_TOKENS_OF_MANY


def is_legal(piece_tokens: int) -> bool:
    """Whether a piece may have so many tokens: a power of two within the limits."""
    is_power_of_two = piece_tokens > 0 and piece_tokens & (piece_tokens - 1) == 0
    return is_power_of_two and PIECE_TOKENS_MIN <= piece_tokens <= PIECE_TOKENS_MAX


def legal_numbers() -> list[int]:
    """All lengths that a piece may have, rising."""
    return [n for n in range(PIECE_TOKENS_MIN, PIECE_TOKENS_MAX + 1) if is_legal(n)]


def parse_piece_tokens(text: str) -> int | None:
    """The number that an option names, or AUTO; raises InputError (theirs)."""
    if text == "auto":
        return AUTO
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and is_legal(int(text))):
        raise InputError(
            f"--piece-tokens is auto or a power of two from {PIECE_TOKENS_MIN} to"
            f" {PIECE_TOKENS_MAX}, not {text[:20]!r}",
            next_step="`shardmesh bench pieces` measures which one suits the machines",
        )
    return int(text)


def choose_piece_tokens(wanted: int | None, *, n_shards: int, row_bytes: int) -> int:
    """The length that is wanted, or for AUTO the one that suits so many shards.

    `row_bytes` are those of the hidden states of one token.  Raises InputError (theirs) if those
    of a piece are more than links have room for, or the number is not legal.
    """
    fitting = [n for n in legal_numbers() if n * row_bytes <= PIECE_BYTES_MAX]
    if not fitting:
        raise InputError(
            f"the hidden states of a token have {row_bytes:,} bytes, too many to send"
            f" {PIECE_TOKENS_MIN} of them at once",
            code="TOO_WIDE",
            next_step="run the model whole on one machine",
        )
    if wanted is AUTO:
        return min(auto_piece_tokens(n_shards), fitting[-1])
    if not is_legal(wanted):
        raise InputError(f"a piece cannot have {wanted} tokens")
    if wanted not in fitting:
        raise InputError(
            f"the hidden states of {wanted} tokens have {wanted * row_bytes:,} bytes, more than"
            f" {PIECE_BYTES_MAX:,}: pieces of this model have {fitting[-1]} tokens at most",
            code="TOO_WIDE",
            next_step=f"give --piece-tokens {fitting[-1]} or less",
        )
    return wanted
