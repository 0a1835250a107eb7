"""The hash trees of BitTorrent v2 (BEP 52): SHA-256 of 16 KiB blocks, in pairs up to a root."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

BLOCK_BYTES: Final = 16 * 1024
HASH_BYTES: Final = 32
PIECE_BYTES_MIN: Final = 256 * 1024
PIECE_BYTES_MAX: Final = 16 * 1024 * 1024
_PIECES_AIM: Final = 2048


def piece_bytes_of(n_bytes: int) -> int:
    """The piece length of a file: so that it has 2,048 pieces at most, from 256 KiB to 16 MiB.

    It follows from the size alone, so that equal files have equal info-hashes everywhere.
    """
    piece_bytes = PIECE_BYTES_MIN
    while piece_bytes < PIECE_BYTES_MAX and n_bytes > piece_bytes * _PIECES_AIM:
        piece_bytes *= 2
    return piece_bytes


def n_pieces_of(n_bytes: int, piece_bytes: int) -> int:
    """Pieces of a file; the last one may be shorter."""
    return -(-n_bytes // piece_bytes)


def merkle_root(leaves: Sequence[bytes], n_leaves: int, pad: bytes = bytes(HASH_BYTES)) -> bytes:
    """The root over the leaves, filled up with `pad` to `n_leaves`, a power of two."""
    layer = list(leaves)
    while n_leaves > 1:
        if len(layer) % 2:
            layer.append(pad)
        layer = [_pair(layer[i], layer[i + 1]) for i in range(0, len(layer), 2)]
        pad = _pair(pad, pad)
        n_leaves //= 2
    return layer[0] if layer else pad


def power_of_two_from(number: int) -> int:
    """The smallest power of two that is not below the number."""
    return 1 << max(0, number - 1).bit_length()


def root_of_pieces(piece_hashes: Sequence[bytes], piece_bytes: int) -> bytes:
    """The root of a file of more than one piece, from the hashes of its pieces."""
    n_blocks = piece_bytes // BLOCK_BYTES
    return merkle_root(
        piece_hashes, power_of_two_from(len(piece_hashes)), merkle_root([], n_blocks)
    )


def _pair(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(left + right).digest()
