"""Reading a file once for all its hashes: its SHA-256 and its torrent."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

from shardmesh.errors import StorageError
from shardmesh.wire.merkle import (
    BLOCK_BYTES,
    HASH_BYTES,
    merkle_root,
    n_pieces_of,
    piece_bytes_of,
    power_of_two_from,
    root_of_pieces,
)
from shardmesh.wire.torrent_file import TorrentFile


@dataclasses.dataclass(frozen=True)
class HashedFile:
    """What a file's contents are."""

    sha256: str
    torrent: TorrentFile


def hash_file(path: Path, *, progress: Callable[[int], None] | None = None) -> HashedFile:
    """SHA-256 and torrent of a file that nobody writes meanwhile; `progress` gets bytes done.

    Raises OSError, StorageError (ours) if the file shrinks while it is read.
    """
    n_bytes = path.stat().st_size
    piece_bytes = piece_bytes_of(n_bytes)
    n_pieces = n_pieces_of(n_bytes, piece_bytes)
    whole = hashlib.sha256()
    pieces: list[bytes] = []
    buffer = memoryview(bytearray(min(piece_bytes, n_bytes)))
    with path.open("rb", buffering=0) as file:
        for number in range(n_pieces):
            piece = buffer[: min(piece_bytes, n_bytes - number * piece_bytes)]
            _read_into(file.readinto, piece, path)
            whole.update(piece)
            pieces.append(_piece_hash(piece, piece_bytes, is_only=n_pieces == 1))
            if progress is not None:
                progress(len(piece))
    if n_pieces > 1:
        root, layer = root_of_pieces(pieces, piece_bytes), b"".join(pieces)
    else:
        root, layer = pieces[0] if pieces else bytes(HASH_BYTES), b""
    torrent = TorrentFile(name=path.name, n_bytes=n_bytes, pieces_root=root, piece_layer=layer)
    return HashedFile(whole.hexdigest(), torrent)


def _read_into(readinto: Callable[[memoryview], int | None], piece: memoryview, path: Path) -> None:
    n_read = 0
    while n_read < len(piece):
        n_more = readinto(piece[n_read:])
        if not n_more:
            raise StorageError(f"{path} became shorter while it was read")
        n_read += n_more


def _piece_hash(piece: memoryview, piece_bytes: int, *, is_only: bool) -> bytes:
    """The root of one piece's blocks; the tree of a file's only piece is no larger than needed."""
    blocks = [
        hashlib.sha256(piece[start : start + BLOCK_BYTES]).digest()
        for start in range(0, len(piece), BLOCK_BYTES)
    ]
    n_leaves = power_of_two_from(len(blocks)) if is_only else piece_bytes // BLOCK_BYTES
    return merkle_root(blocks, n_leaves)
