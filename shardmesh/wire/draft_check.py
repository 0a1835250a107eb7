"""The check of a draft: shows the last stage, and nobody else, which token was guessed."""

from __future__ import annotations

import hashlib
import struct

from shardmesh.wire.limits import DRAFT_CHECK_BYTES


def draft_check(key: bytes, position: int, token: int) -> bytes:
    """DRAFT_CHECK_BYTES over a position and the token there; `key` is the session's `draft_key`."""
    fields = struct.pack("<QI", position, token)
    return hashlib.blake2b(fields, digest_size=DRAFT_CHECK_BYTES, key=key).digest()
