"""Micro-batches of hidden states as a stage would send them, and as none would."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from shardmesh.wire.messages import HiddenBatch

_ONE_ROW: Final = HiddenBatch(
    session=bytes(16),
    epoch=0,
    position=0,
    n_tokens=1,
    n_embd=8,
    dtype="f32",
    sample=True,
    timings=(),
    embed=False,
    branch=0,
    check=b"",
    scored=(),
    hand=False,
)


def hidden_batch(**fields: Any) -> HiddenBatch:
    """One row, eight numbers wide, behind which a token is sampled; but for these fields."""
    return msgspec.structs.replace(_ONE_ROW, **fields)
