"""A manifest signed by who publishes the model, with the info-hashes of its files.

The manifest stays what it was, digest and all: nodes that got the files by hand and nodes that
fetched them form one chain.  `publication.cbor` lies beside `manifest.json`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Final

import msgspec

from shardmesh.errors import InputError, ProtocolError, StorageError
from shardmesh.shards.atomic import atomic_file
from shardmesh.shards.manifest import (
    AdapterFile,
    Manifest,
    ShardEntry,
    TokenizerEntry,
    check_manifest,
)
from shardmesh.shards.names import TOKENIZER_NAME, adapter_name, shard_name
from shardmesh.wire.codec import decode_cbor, encode_cbor
from shardmesh.wire.envelope import Signer, open_envelope, sign_body
from shardmesh.wire.limits import ADAPTERS_MAX, MODEL_LAYERS_MAX, PUBLICATION_BYTES_MAX
from shardmesh.wire.merkle import HASH_BYTES

PUBLICATION_NAME: Final = "publication.cbor"
SCHEMA_VERSION: Final = 1
_DOMAIN: Final = b"shardmesh publication 1\0"

InfoHash = Annotated[bytes, msgspec.Meta(min_length=HASH_BYTES, max_length=HASH_BYTES)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """One file of a published model, and all that it is held against."""

    name: str
    n_bytes: int
    sha256: str
    info_hash: bytes


class Publication(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the publisher signs."""

    schema_version: Annotated[int, msgspec.Meta(ge=SCHEMA_VERSION, le=SCHEMA_VERSION)] = (
        SCHEMA_VERSION
    )
    manifest: Manifest
    shard_info_hashes: Annotated[
        tuple[InfoHash, ...], msgspec.Meta(min_length=1, max_length=MODEL_LAYERS_MAX)
    ]
    tokenizer_info_hash: InfoHash
    adapter_info_hashes: Annotated[
        tuple[
            Annotated[tuple[InfoHash | None, ...], msgspec.Meta(max_length=MODEL_LAYERS_MAX)], ...
        ],
        msgspec.Meta(max_length=ADAPTERS_MAX),
    ]
    """For each adapter, for each shard; None where the adapter changes nothing in a shard."""

    def __post_init__(self) -> None:
        if len(self.shard_info_hashes) != len(self.manifest.shards):
            raise ValueError("not one info-hash for each shard")
        has_file = [[f is not None for f in a.files] for a in self.manifest.adapters]
        if has_file != [[h is not None for h in hashes] for hashes in self.adapter_info_hashes]:
            raise ValueError("not one info-hash for each part of an adapter")

    def shard(self, shard_id: int) -> PublishedFile:
        """A shard's file; raises InputError (theirs, NO_SUCH_SHARD) for a number beyond."""
        if not 0 <= shard_id < len(self.manifest.shards):
            raise InputError(
                f"{self.manifest.model_name} has no shard {shard_id}, only "
                f"{len(self.manifest.shards)} numbered from 0",
                code="NO_SUCH_SHARD",
                next_step=f"ask for 0 to {len(self.manifest.shards) - 1}",
            )
        entry = self.manifest.shards[shard_id]
        return _file(shard_name(shard_id), entry, self.shard_info_hashes[shard_id])

    def shard_files(self, shard_id: int) -> list[PublishedFile]:
        """All that a listener of the shard needs: its file, and the adapters' parts for it."""
        found = [self.shard(shard_id)]
        for number, adapter in enumerate(self.manifest.adapters):
            entry = adapter.files[shard_id]
            info_hash = self.adapter_info_hashes[number][shard_id]
            if entry is not None and info_hash is not None:
                found.append(_file(adapter_name(number, shard_id), entry, info_hash))
        return found

    def tokenizer(self) -> PublishedFile:
        return _file(TOKENIZER_NAME, self.manifest.tokenizer, self.tokenizer_info_hash)

    def files(self) -> list[PublishedFile]:
        """All files, the tokenizer last."""
        n_shards = len(self.manifest.shards)
        shards = [file for shard_id in range(n_shards) for file in self.shard_files(shard_id)]
        return [*shards, self.tokenizer()]


@dataclasses.dataclass(frozen=True)
class OpenPublication:
    """A publication whose signature is right, and whose it is."""

    publication: Publication
    publisher: bytes
    signed: bytes

    @property
    def manifest(self) -> Manifest:
        return self.publication.manifest


def sign_publication(publication: Publication, signer: Signer) -> bytes:
    """The publication in an envelope with the publisher's key and signature."""
    check_manifest(publication.manifest)
    return sign_body(encode_cbor(publication), _DOMAIN, signer)


def open_publication(
    signed: bytes, *, manifest_digest: str, publisher: bytes | None = None
) -> OpenPublication:
    """The publication of this very manifest, by this publisher if one is named.

    Raises ProtocolError (theirs): BAD_SIGNATURE if the publisher did not sign it, WRONG_PUBLISHER
    if it is somebody else's, BAD_MANIFEST if it is of another manifest or contradicts itself.
    """
    envelope = open_envelope(signed, PUBLICATION_BYTES_MAX, "a publication")
    if publisher is not None and envelope.public_key != publisher:
        raise ProtocolError(
            "the manifest is signed by another publisher than the model link names",
            code="WRONG_PUBLISHER",
            next_step="get a new link from the publisher whom you trust",
        )
    if not envelope.is_signed_as(_DOMAIN):
        raise ProtocolError("the signature of a manifest is wrong", code="BAD_SIGNATURE")
    publication = decode_cbor(envelope.body, Publication)
    try:
        check_manifest(publication.manifest)
    except InputError as error:
        raise ProtocolError(str(error), code="BAD_MANIFEST") from error
    if publication.manifest.digest() != manifest_digest:
        raise ProtocolError("another manifest than asked for", code="BAD_MANIFEST")
    return OpenPublication(publication, envelope.public_key, signed)


def read_publication(folder: Path, manifest: Manifest) -> OpenPublication | None:
    """The publication that lies beside a manifest; None if there is none.

    Raises ProtocolError (theirs) for one that is not the manifest's, StorageError (ours).
    """
    path = folder / PUBLICATION_NAME
    try:
        with path.open("rb") as file:
            signed = file.read(PUBLICATION_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    return open_publication(signed, manifest_digest=manifest.digest())


def write_publication(folder: Path, signed: bytes) -> None:
    """Puts a publication beside its manifest, whole or not at all.  Raises StorageError (ours)."""
    path = folder / PUBLICATION_NAME
    try:
        with atomic_file(path) as file:
            file.write(signed)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error


def _file(
    name: str, entry: ShardEntry | TokenizerEntry | AdapterFile, info_hash: bytes
) -> PublishedFile:
    return PublishedFile(name=name, n_bytes=entry.n_bytes, sha256=entry.sha256, info_hash=info_hash)
