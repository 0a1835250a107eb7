"""A torrent of Shardmesh: BitTorrent v2 only (BEP 52), one file, private (BEP 27).

Everything in it follows from name, size and contents of the file, so that whoever has the same
file under the same name comes to the same info-hash.  A torrent that was made otherwise is refused
before libtorrent sees it: no folders, no paths, no further keys, no other piece length.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Final

from shardmesh.errors import ProtocolError
from shardmesh.wire.bencode import Bencoded, decode_bencode, encode_bencode
from shardmesh.wire.limits import TORRENT_FILE_BYTES_MAX, TORRENT_NAME_BYTES_MAX
from shardmesh.wire.merkle import HASH_BYTES, n_pieces_of, piece_bytes_of, root_of_pieces

_SUFFIX: Final = ".gguf"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorrentFile:
    """The torrent of one GGUF file."""

    name: str
    n_bytes: int
    pieces_root: bytes
    """Root of the file's hash tree, 32 bytes."""
    piece_layer: bytes
    """SHA-256 of each piece, one after the other; empty for a file of one piece."""

    @property
    def piece_bytes(self) -> int:
        return piece_bytes_of(self.n_bytes)

    def info_hash(self) -> bytes:
        """SHA-256 of the info dictionary, 32 bytes."""
        return hashlib.sha256(encode_bencode(self._info())).digest()

    def encode(self) -> bytes:
        """The torrent file as libtorrent reads it."""
        layers: Bencoded = {self.pieces_root: self.piece_layer} if self.piece_layer else {}
        return encode_bencode({b"info": self._info(), b"piece layers": layers})

    def _info(self) -> Bencoded:
        name = self.name.encode()
        return {
            b"file tree": {
                name: {b"": {b"length": self.n_bytes, b"pieces root": self.pieces_root}}
            },
            b"meta version": 2,
            b"name": name,
            b"piece length": self.piece_bytes,
            b"private": 1,
        }


def is_file_name(name: str) -> bool:
    """Whether a torrent may carry this name: one visible GGUF file, nothing of a path."""
    return (
        name.endswith(_SUFFIX)
        and not name.startswith(".")
        and len(name.encode(errors="replace")) <= TORRENT_NAME_BYTES_MAX
        and name.isprintable()
        and "/" not in name
        and "\\" not in name
    )


def decode_torrent(data: bytes) -> TorrentFile:
    """The torrent in the bytes; raises ProtocolError (theirs, BAD_TORRENT) for one not of our kind.

    The hash of each piece is held against the root, so a torrent of the right info-hash has the
    right hashes.
    """
    match decode_bencode(data):
        case {
            b"info": {
                b"file tree": {**tree},
                b"name": bytes(raw_name),
            },
            b"piece layers": {**layers},
        }:
            pass
        case _:
            raise _bad("not a torrent of BitTorrent v2")
    match tree.get(raw_name):
        case {b"": {b"length": int(n_bytes), b"pieces root": bytes(root)}}:
            pass
        case _:
            raise _bad("not a torrent of one file")
    layer = layers.get(root, b"")
    if not isinstance(layer, bytes):
        raise _bad("its piece layer is none")
    torrent = TorrentFile(
        name=_name(raw_name), n_bytes=n_bytes, pieces_root=root, piece_layer=layer
    )
    _check(torrent)
    if torrent.encode() != data:  # other keys, another piece length, files beside the one
        raise _bad("it says more or other things than Shardmesh's torrents do")
    return torrent


def _name(raw: bytes) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise _bad("its name is no text") from None
    if not is_file_name(name):
        raise _bad("its name is not that of a GGUF file")
    return name


def _check(torrent: TorrentFile) -> None:
    if not 1 <= torrent.n_bytes <= TORRENT_FILE_BYTES_MAX:
        raise _bad(f"a file of {torrent.n_bytes} bytes")
    if len(torrent.pieces_root) != HASH_BYTES:
        raise _bad("its root is no SHA-256")
    n_pieces = n_pieces_of(torrent.n_bytes, torrent.piece_bytes)
    if len(torrent.piece_layer) != (HASH_BYTES * n_pieces if n_pieces > 1 else 0):
        raise _bad("its piece layer has another length")
    if n_pieces > 1:
        layer = torrent.piece_layer
        pieces = [layer[i : i + HASH_BYTES] for i in range(0, len(layer), HASH_BYTES)]
        if root_of_pieces(pieces, torrent.piece_bytes) != torrent.pieces_root:
            raise _bad("its piece layer does not belong to its root")


def _bad(what: str) -> ProtocolError:
    return ProtocolError(f"a torrent is refused: {what}", code="BAD_TORRENT")
