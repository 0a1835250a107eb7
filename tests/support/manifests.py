"""Manifests for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from shardmesh.shards.manifest import SCHEMA_VERSION, Manifest, ShardEntry, TokenizerEntry


def a_manifest(n_layers: Sequence[int] = (2, 2, 2), **changes: Any) -> Manifest:
    """That of a model with shards of so many layers each, with the changes."""
    ends = [sum(n_layers[: i + 1]) for i in range(len(n_layers))]
    plain = Manifest(
        schema_version=SCHEMA_VERSION,
        model_name="fairy tales",
        architecture="llama",
        n_layer=ends[-1],
        n_embd=64,
        n_ctx_train=512,
        piece_tokens=32,
        can_roll_back=True,
        adapters=(),
        quantization="Q4_K_M",
        slicer_version="0.1.0",
        shards=tuple(
            ShardEntry(
                shard_id=i,
                layer_start=end - n,
                layer_end=end,
                n_bytes=100 + i,
                sha256="ab" * 32,
            )
            for i, (n, end) in enumerate(zip(n_layers, ends, strict=True))
        ),
        tokenizer=TokenizerEntry(n_bytes=7, sha256="cd" * 32),
    )
    return msgspec.structs.replace(plain, **changes)
