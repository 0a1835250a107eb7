"""What a mesh looks like right now: models, shards, replicas, and what is missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import msgspec
import trio

from shardmesh.coordinator.chain import missing_layers, models_of
from shardmesh.coordinator.coordinator import replica_of
from shardmesh.errors import ShardmeshError
from shardmesh.swarm.commands import get_capabilities, send_command
from shardmesh.swarm.host import Host
from shardmesh.wire.announcement import Announcement
from shardmesh.wire.limits import LINKS_MAX

ASK_TIMEOUT_S = 3.0
"""For one node's answer; a node that takes longer is shown as not answering."""


@dataclasses.dataclass(frozen=True)
class LinkView:
    """A link between two stages, as the one that dialed it tells."""

    peer_id: str  # of the other stage
    kind: Literal["direct", "stream", "relayed"]  # a stream is one of libp2p
    round_trip_ms: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a node said when it was asked, and how long that took."""

    state: str = "no answer"
    round_trip_ms: float | None = None
    path: str | None = None
    links: tuple[LinkView, ...] = ()


@dataclasses.dataclass(frozen=True)
class ReplicaView:
    """One listener as it is shown."""

    peer_id: str
    shard_id: int
    layer_start: int
    layer_end: int
    state: str  # loaded, loading, absent, failed, or "no answer"
    memory_mb: int
    memory_available_mb: int
    n_ctx: int
    fingerprint: str
    round_trip_ms: float | None
    path: str | None  # direct or relayed: how this client reached it
    links: tuple[LinkView, ...]  # those that it keeps to next stages
    addresses: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ModelView:
    """One model of the mesh."""

    model_name: str
    manifest_digest: str
    n_layer: int
    total_shards: int
    replicas: tuple[ReplicaView, ...]
    missing: tuple[tuple[int, int], ...]  # half-open layer ranges

    @property
    def is_complete(self) -> bool:
        return not self.missing

    @property
    def is_exact(self) -> bool:
        """Whether all loaded replicas compute alike, so that any chain gives the same bits."""
        return len({r.fingerprint for r in self.replicas if r.state == "loaded"}) <= 1


async def look_at_mesh(host: Host, announcements: Sequence[Announcement]) -> tuple[ModelView, ...]:
    """Asks every announced node itself, all at once; a silent one counts as not there."""
    answers: dict[str, Answer] = {}

    async def ask(peer_id: str) -> None:
        answers[peer_id] = await _ask(host, peer_id)

    async with trio.open_nursery() as nursery:
        for announcement in announcements:
            nursery.start_soon(ask, announcement.peer_id)
    return overview(announcements, answers)


async def _ask(host: Host, peer_id: str) -> Answer:
    try:
        started_s = trio.current_time()
        said = await get_capabilities(host, peer_id, ASK_TIMEOUT_S)
        elapsed_ms = (trio.current_time() - started_s) * 1e3
        metrics = await send_command(host, peer_id, "GET_METRICS", None, ASK_TIMEOUT_S)
        links = [msgspec.convert(link, LinkView) for link in metrics["links"][:LINKS_MAX]]
    except (ShardmeshError, msgspec.ValidationError, KeyError, TypeError):
        return Answer()
    return Answer(
        state=said.shard_state,
        round_trip_ms=round(elapsed_ms, 1),
        path="relayed" if host.is_relayed(peer_id) else "direct",
        links=tuple(links),
    )


def overview(
    announcements: Sequence[Announcement], answers: dict[str, Answer]
) -> tuple[ModelView, ...]:
    """Announcements and the answer of each node, by model.  Pure."""
    by_peer = {a.peer_id: a for a in announcements}
    replicas = [
        dataclasses.replace(replica_of(a), shard_loaded=answers[a.peer_id].state == "loaded")
        for a in announcements
    ]
    views = []
    for (model_name, digest), found in sorted(models_of(replicas).items()):
        missing = missing_layers(found)
        views.append(
            ModelView(
                model_name=model_name,
                manifest_digest=digest,
                n_layer=found[0].n_layer,
                total_shards=by_peer[found[0].peer_id].total_shards,
                replicas=tuple(
                    _view(by_peer[r.peer_id], answers[r.peer_id])
                    for r in sorted(found, key=lambda r: (r.shard_id, r.peer_id))
                ),
                missing=tuple(missing),
            )
        )
    return tuple(views)


def _view(announcement: Announcement, answer: Answer) -> ReplicaView:
    capabilities = announcement.capabilities
    return ReplicaView(
        peer_id=announcement.peer_id,
        shard_id=announcement.shard_id,
        layer_start=announcement.layer_start,
        layer_end=announcement.layer_end,
        state=answer.state,
        memory_mb=capabilities.memory_mb,
        memory_available_mb=capabilities.memory_available_mb,
        n_ctx=capabilities.n_ctx,
        fingerprint=announcement.engine_fingerprint,
        round_trip_ms=answer.round_trip_ms,
        path=answer.path,
        links=answer.links,
        addresses=announcement.addresses,
    )
