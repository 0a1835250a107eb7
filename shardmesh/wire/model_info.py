"""Handing over a model's manifest and tokenizer: what a coordinator needs besides a chain.

Asked for by the manifest's digest, which stands in signed announcements; the tokenizer is held
against the SHA-256 in the manifest.  So it does not matter who hands them over.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from shardmesh.wire.limits import MANIFEST_BYTES_MAX, MIB

MODEL_INFO_PROTOCOL: Final = "/shardmesh/model-info/1.0"

TOKENIZER_BYTES_MAX: Final = 64 * MIB
"""A tokenizer file; the largest known vocabularies take 30 MiB."""

MODEL_INFO_REQUEST_BYTES_MAX: Final = 1024
"""A request: one digest and a little around it."""

MODEL_INFO_BYTES_MAX: Final = MANIFEST_BYTES_MAX + TOKENIZER_BYTES_MAX + 1024


class ModelInfoRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Asks for the model with this manifest digest."""

    manifest_digest: Annotated[str, msgspec.Meta(max_length=64)]


class ModelInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The manifest as JSON and the whole file `tokenizer.gguf`; None if the node lacks them."""

    manifest: Annotated[bytes, msgspec.Meta(max_length=MANIFEST_BYTES_MAX)] | None
    tokenizer: Annotated[bytes, msgspec.Meta(max_length=TOKENIZER_BYTES_MAX)] | None
