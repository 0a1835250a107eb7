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
    hidden = np.ascontiguousarray(np.frombuffer(body, dtype=_DTYPES[wire]), dtype=np.float32)
    # Not `all()`, which is a function in Python: this is done for each token on its way.
    if not np.logical_and.reduce(np.isfinite(hidden)):
        raise ProtocolError("hidden states hold a value that is not finite", code="NOT_FINITE")
    return hidden.reshape(n_tokens, n_embd)
