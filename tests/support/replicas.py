"""Replicas for tests: listeners as a coordinator knows them."""

from __future__ import annotations

import dataclasses
from typing import Any

from shardmesh.coordinator.chain import Replica


def replica(peer_id: str, layer_start: int = 0, layer_end: int = 2, **changes: Any) -> Replica:
    """One that serves these layers of a model with four, with the changes."""
    plain = Replica(
        peer_id=peer_id,
        addresses=("/ip4/192.0.2.1/tcp/1",),
        model_name="m",
        manifest_digest="d",
        shard_id=0,
        layer_start=layer_start,
        layer_end=layer_end,
        n_layer=4,
        n_ctx=64,
        shard_loaded=True,
        fingerprint="f",
    )
    return dataclasses.replace(plain, **changes)
