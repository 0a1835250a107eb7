"""What nodes ask each other about model files: /torrent/1.0, CBOR both ways.

A file is asked for by info-hash, a published model by its manifest's digest; never by a name or a
path.  The bytes of files travel over BitTorrent, to the port that is told here.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from shardmesh.wire.limits import PUBLICATION_BYTES_MAX, TORRENT_BYTES_MAX

TORRENT_PROTOCOL: Final = "/torrent/1.0"

InfoHash = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$", max_length=64)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class FileRequest(_Message, frozen=True, tag="file"):
    """Asks for a file's torrent, and whether the other side has pieces of it."""

    info_hash: InfoHash
    wants_torrent: bool
    port: Port  # of the asking side's BitTorrent, so that the other one can dial; 0: it cannot


class ModelRequest(_Message, frozen=True, tag="model"):
    """Asks for the signed manifest with this digest."""

    manifest_digest: Digest


TorrentRequest = FileRequest | ModelRequest


class FileResponse(_Message, frozen=True):
    """What the other side has of a file."""

    port: Port  # where its BitTorrent listens, on the host that was asked; 0: it has nothing
    torrent: Annotated[bytes, msgspec.Meta(max_length=TORRENT_BYTES_MAX)] | None


class ModelResponse(_Message, frozen=True):
    """A signed manifest, nil if the other side has none with this digest."""

    publication: Annotated[bytes, msgspec.Meta(max_length=PUBLICATION_BYTES_MAX)] | None
