"""Hidden states as bytes on the wire: float32 is exact, float16 half as long.

A number of float16 ends at 65504.  Some models have larger ones in a few places, so whether a
micro-batch fits is looked at each time, and each frame names its own type.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from shardmesh.errors import ProtocolError

WireType = Literal["f32", "f16"]

EXACT: Final[WireType] = "f32"

_DTYPES: Final[dict[WireType, np.dtype[np.floating[Any]]]] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
}


_FEW_BYTES: Final = 32 * 1024
"""Of one token in the widest models: 8,192 numbers."""


def n_body_bytes(n_tokens: int, n_embd: int, wire: WireType) -> int:
    """Bytes of hidden states (n_tokens, n_embd)."""
    return n_tokens * n_embd * _DTYPES[wire].itemsize


def hidden_to_body(
    hidden: npt.NDArray[np.float32], wire: WireType = EXACT
) -> tuple[memoryview, WireType]:
    """Hidden states (n_tokens, n_embd) as raw little-endian numbers, and of which type they are.

    float32 without a copy if possible; also where float16 was wanted and a value does not fit.
    """
    if wire != EXACT:
        with np.errstate(over="ignore"):
            short = np.ascontiguousarray(hidden, dtype=_DTYPES[wire])
        if np.isfinite(short).all():
            return short.data.cast("B"), wire
    return np.ascontiguousarray(hidden, dtype=_DTYPES[EXACT]).data.cast("B"), EXACT


def body_to_hidden(
    body: memoryview, n_tokens: int, n_embd: int, wire: WireType
) -> npt.NDArray[np.float32]:
    """Hidden states (n_tokens, n_embd); raises ProtocolError (theirs) if a value is not finite."""
    hidden = np.frombuffer(body, dtype=_DTYPES[wire])
    if _DTYPES[wire] != np.float32:
        hidden = hidden.astype(np.float32)
    if not _are_surely_finite(body, wire) and not np.isfinite(hidden).all():
        raise ProtocolError("hidden states hold a value that is not finite", code="NOT_FINITE")
    return hidden.reshape(n_tokens, n_embd)


def _are_surely_finite(body: memoryview, wire: WireType) -> bool:
    """Whether a few float32 are, by their highest bytes: all below 1.7e38 is.

    For one token this takes half of what asking numpy does, whose code is out of the caches by
    then; for many it would take longer.
    """
    if wire != EXACT or len(body) > _FEW_BYTES:
        return False
    highest = bytes(body)[3::4]
    return 0x7F not in highest and 0xFF not in highest
