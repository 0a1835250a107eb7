"""Announcements for tests."""

from __future__ import annotations

import time

import msgspec

from shardmesh.swarm.identity import Identity
from shardmesh.wire.announcement import Announcement, Capabilities

CLUSTER = "llama-cluster"


def capabilities(*, shard_loaded: bool = True, **changes: object) -> Capabilities:
    plain = Capabilities(
        shard_loaded=shard_loaded,
        memory_mb=1000,
        memory_available_mb=500,
        cpu_cores=2,
        gpu_available=False,
        n_ctx=2048,
        n_parallel=4,
        has_tokenizer=False,
    )
    return msgspec.structs.replace(plain, **changes)


def an_announcement(identity: Identity, **changes: object) -> Announcement:
    """A timely announcement of shard 0 of 4, with the changes."""
    now_s = int(time.time())
    plain = Announcement(
        cluster=CLUSTER,
        peer_id=identity.peer_id,
        shard_id=0,
        total_shards=4,
        total_layers=8,
        layer_start=0,
        layer_end=2,
        model_name="fairy",
        manifest_digest="ab" * 32,
        engine_fingerprint="fake-1",
        addresses=(f"/ip4/127.0.0.1/tcp/4001/p2p/{identity.peer_id}",),
        capabilities=capabilities(),
        sequence=1,
        issued_at_s=now_s,
        expires_at_s=now_s + 600,
    )
    return msgspec.structs.replace(plain, **changes)
