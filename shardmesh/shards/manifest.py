"""The list of a model's shards: ranges, sizes, digests; `manifest.json` beside the shard files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Final

import msgspec

from shardmesh.errors import InputError, ProtocolError, ShardmeshError, StorageError
from shardmesh.shards.atomic import atomic_file
from shardmesh.shards.layers import LayerRange, check_cover
from shardmesh.shards.piece_tokens import is_legal
from shardmesh.wire.codec import decode_json, encode_cbor, encode_json
from shardmesh.wire.limits import (
    ADAPTERS_MAX,
    MANIFEST_BYTES_MAX,
    MODEL_LAYERS_MAX,
    MODEL_NAME_BYTES_MAX,
    PIECE_TOKENS_MAX,
    PIECE_TOKENS_MIN,
)

MANIFEST_NAME: Final = "manifest.json"
SCHEMA_VERSION: Final = 1
NUMBER_MAX: Final = 2**31 - 1
"""Widths and lengths: llama.cpp keeps them in 32 bits."""

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$", min_length=64, max_length=64)]
Bytes = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
Layer = Annotated[int, msgspec.Meta(ge=0, le=MODEL_LAYERS_MAX)]
Word = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9._+-]+$", min_length=1, max_length=64)]
Number = Annotated[int, msgspec.Meta(ge=1, le=NUMBER_MAX)]


class ShardEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One shard file; its name follows from its number."""

    shard_id: Layer
    layer_start: Layer
    layer_end: Layer
    n_bytes: Bytes
    sha256: Sha256

    @property
    def layers(self) -> LayerRange:
        return LayerRange(self.layer_start, self.layer_end)


class TokenizerEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file `tokenizer.gguf`."""

    n_bytes: Bytes
    sha256: Sha256


class AdapterFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an adapter changes in one shard; its name follows from the two numbers."""

    n_bytes: Bytes
    sha256: Sha256


class AdapterEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A LoRA adapter, cut along with the model; None where it changes nothing in a shard."""

    name: Word
    files: Annotated[
        tuple[AdapterFile | None, ...], msgspec.Meta(min_length=1, max_length=MODEL_LAYERS_MAX)
    ]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A split model; checked with `check_manifest` wherever one comes in."""

    schema_version: int
    model_name: str
    architecture: Word
    n_layer: Layer
    n_embd: Number
    n_ctx_train: Number
    piece_tokens: int  # of a prompt, in one micro-batch: it decides the last bits
    can_roll_back: bool  # else a sequence can only go on, or start again from its beginning
    quantization: Word
    slicer_version: Word
    shards: Annotated[
        tuple[ShardEntry, ...], msgspec.Meta(min_length=1, max_length=MODEL_LAYERS_MAX)
    ]
    tokenizer: TokenizerEntry
    adapters: Annotated[tuple[AdapterEntry, ...], msgspec.Meta(max_length=ADAPTERS_MAX)]

    def digest(self) -> str:
        """SHA-256 in hex over the deterministic CBOR: equal digests, equal shards."""
        return hashlib.sha256(encode_cbor(self)).hexdigest()


def check_manifest(manifest: Manifest) -> Manifest:
    """The manifest itself if its parts agree; raises InputError or ProtocolError (theirs)."""
    if manifest.schema_version != SCHEMA_VERSION:
        raise InputError(
            f"the manifest has schema version {manifest.schema_version}, not {SCHEMA_VERSION}",
            code="BAD_MANIFEST",
            next_step="use the same version of Shardmesh everywhere, or split the model again",
        )
    check_model_name(manifest.model_name)
    if not is_legal(manifest.piece_tokens):
        raise InputError(
            f"the manifest has prompts go in pieces of {manifest.piece_tokens} tokens, which is not"
            f" a power of two from {PIECE_TOKENS_MIN} to {PIECE_TOKENS_MAX}",
            code="BAD_MANIFEST",
        )
    if [shard.shard_id for shard in manifest.shards] != list(range(len(manifest.shards))):
        raise InputError("the manifest's shards are not numbered from 0", code="BAD_MANIFEST")
    check_cover([shard.layers for shard in manifest.shards], manifest.n_layer)
    names = [adapter.name for adapter in manifest.adapters]
    if len(set(names)) != len(names):
        raise InputError("two adapters of the manifest have one name", code="BAD_MANIFEST")
    if any(len(adapter.files) != len(manifest.shards) for adapter in manifest.adapters):
        raise InputError(
            "an adapter of the manifest is not cut into as many parts as the model",
            code="BAD_MANIFEST",
        )
    return manifest


def check_model_name(name: str) -> str:
    """The name itself; raises InputError (theirs) if it is empty, long or has odd characters."""
    if not 1 <= len(name.encode()) <= MODEL_NAME_BYTES_MAX or not name.isprintable():
        raise InputError(
            f"a model name has 1 to {MODEL_NAME_BYTES_MAX} bytes and only printable characters",
            code="BAD_MODEL_NAME",
            next_step="give another one with --name",
        )
    return name


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file.

    Raises InputError (theirs) when it is not a good manifest, StorageError (ours) when the disk
    fails.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MANIFEST_BYTES_MAX + 1)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist", code="BAD_MANIFEST") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MANIFEST_BYTES_MAX:
        raise InputError(f"{path} is too long for a manifest", code="BAD_MANIFEST")
    try:
        return check_manifest(decode_json(data, Manifest))
    except (ProtocolError, InputError) as error:
        raise InputError(
            f"{path} is not a good manifest: {error}",
            code="BAD_MANIFEST",
            next_step=_next_step(error),
        ) from error


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Writes the manifest as JSON; it is there whole or not at all.  Raises StorageError (ours)."""
    try:
        with atomic_file(path) as file:
            file.write(encode_manifest(manifest))
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON that a person can read."""
    return msgspec.json.format(encode_json(check_manifest(manifest)), indent=2) + b"\n"


def _next_step(error: ShardmeshError) -> str:
    return error.next_step or "split the model again, or fetch the manifest again"
