"""How long one waits for the network."""

from __future__ import annotations

from shardmesh.wire.limits import WRITE_BYTES_PER_S_MIN, WRITE_TIMEOUT_S


def write_timeout_s(n_bytes: int) -> float:
    """Until so many bytes must have been taken: on a slow line a long message needs its time."""
    return WRITE_TIMEOUT_S + n_bytes / WRITE_BYTES_PER_S_MIN
