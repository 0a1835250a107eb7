"""Nodes of a mesh as the console sees them, without a network."""

from __future__ import annotations

import msgspec
from support.announcements import capabilities

from shardmesh.web.roster import Node, Report, look
from shardmesh.wire.announcement import Announcement

LAYERS = ((0, 1), (1, 4), (4, 7), (7, 8))
NOW_S = 1_700_000_000


def peer_id_of_number(number: int) -> str:
    """Looks like a peer id, and its end tells nodes apart."""
    return f"12D3KooW{number:044d}"


def announced(
    number: int, shard_id: int | None = None, *, loaded: bool = True, **changes: object
) -> Announcement:
    """What node `number` announces; it serves shard `number` modulo 4 unless told otherwise."""
    shard_id = number % len(LAYERS) if shard_id is None else shard_id
    start, end = LAYERS[shard_id]
    plain = Announcement(
        cluster="demo",
        peer_id=peer_id_of_number(number),
        shard_id=shard_id,
        total_shards=len(LAYERS),
        total_layers=LAYERS[-1][1],
        layer_start=start,
        layer_end=end,
        model_name="fairy tales",
        manifest_digest="ab" * 32,
        engine_fingerprint="fake-1",
        addresses=(f"/ip4/10.0.0.{number % 250 + 1}/tcp/4001",),
        capabilities=capabilities(
            shard_loaded=loaded,
            memory_mb=16_000,
            memory_available_mb=9_000,
            cpu_cores=4,
            n_ctx=2048 if loaded else 0,
            has_tokenizer=True,
        ),
        sequence=1,
        issued_at_s=NOW_S,
        expires_at_s=NOW_S + 600,
    )
    return msgspec.structs.replace(plain, **changes)


def roster_of(
    *announcements: Announcement, reports: dict[str, Report] | None = None, now_s: float = NOW_S
) -> dict[str, Node]:
    """A first look at these nodes."""
    return look({}, announcements, reports or {}, now_s=now_s)
