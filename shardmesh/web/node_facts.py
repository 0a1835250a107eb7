"""What a node tells of itself and of the mesh over HTTP; the same for gateways and listeners."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import psutil

import shardmesh
from shardmesh.coordinator.chain import choose_chain, missing_layers, models_of
from shardmesh.coordinator.coordinator import replica_of
from shardmesh.errors import ShardmeshError
from shardmesh.web.events import EventHub
from shardmesh.wire.announcement import Announcement
from shardmesh.wire.limits import MIB
from shardmesh.wire.node_identity import NodeIdentity

Json = dict[str, Any]

ADDRESSES_KEPT_S: Final = 1.0
"""The node's own addresses are not looked up more often."""


class HostView(Protocol):
    """What is needed of `swarm.host.Host`."""

    @property
    def peer_id(self) -> str: ...

    def addresses(self) -> list[str]: ...

    def connected(self) -> list[str]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """Where the routes under /v1/node find what they tell; all is at hand, nobody is asked."""

    kind: str  # "gateway" or "listener"
    identity: NodeIdentity
    cluster: str
    host: HostView
    announcements: Callable[[], list[Announcement]]
    events: EventHub
    disk: Path  # whose file system is looked at
    own_status: Callable[[], Json]  # what only this kind of node knows
    round_trips_ms: Callable[[], Mapping[str, float | None]] = dict
    started_s: float = dataclasses.field(default_factory=time.monotonic)
    started_at_s: float = dataclasses.field(default_factory=time.time)
    _kept: list[tuple[float, list[str]]] = dataclasses.field(default_factory=list)

    def info(self) -> Json:
        """Who this is."""
        return {
            "id": self.host.peer_id,
            "uuid": self.identity.uuid,
            "name": self.identity.name,
            "location": self.identity.location,
            "tags": list(self.identity.tags),
            "kind": self.kind,
            "version": shardmesh.__version__,
            "cluster": self.cluster,
            "addresses": self._addresses(),
            "started_at_s": round(self.started_at_s, 3),
            "uptime_s": round(time.monotonic() - self.started_s, 3),
        }

    def status(self) -> Json:
        """How it is doing."""
        return {
            "id": self.host.peer_id,
            "name": self.identity.name,
            "kind": self.kind,
            "uptime_s": round(time.monotonic() - self.started_s, 3),
            "n_connections": len(self.host.connected()),
            "n_nodes": len(self.announcements()),
            **self.own_status(),
        }

    def _addresses(self) -> list[str]:
        """Finding them asks the system for its networks, and takes longer than all the rest."""
        now_s = time.monotonic()
        if not self._kept or now_s - self._kept[-1][0] > ADDRESSES_KEPT_S:
            self._kept[:] = [(now_s, self.host.addresses())]
        return self._kept[-1][1]

    def own_announcement(self) -> Announcement | None:
        """What this node announces; None for a gateway, which serves no shard."""
        found = (a for a in self.announcements() if a.peer_id == self.host.peer_id)
        return next(found, None)

    def peers(self) -> list[Json]:
        """All nodes that are known, by shard and peer id."""
        announcements = self.announcements()
        names = Counter(a.identity.name for a in announcements if a.identity.name)
        if self.own_announcement() is None:
            names[self.identity.name] += 1  # a gateway has a name too
        connected, trips = set(self.host.connected()), self.round_trips_ms()
        return [
            {
                "id": a.peer_id,
                "uuid": a.identity.uuid,
                "name": a.identity.name,
                "name_clash": names[a.identity.name] > 1,
                "location": a.identity.location,
                "tags": list(a.identity.tags),
                "addresses": list(a.addresses),
                "shard": shard_of(a),
                "capabilities": capabilities_of(a),
                "connected": a.peer_id in connected,
                "round_trip_ms": trips.get(a.peer_id),
                "last_seen_at_s": a.issued_at_s,
                "expires_at_s": a.expires_at_s,
            }
            for a in announcements
        ]

    def mesh(self) -> Json:
        """The models of the mesh: their stages, what is missing, and the chain of the moment."""
        announcements = [a for a in self.announcements() if a.total_layers]
        models = models_of(replica_of(a) for a in announcements)
        return {
            "cluster": self.cluster,
            "n_nodes": len(announcements),
            "models": [
                _model(name, digest, [a for a in announcements if a.manifest_digest == digest])
                for name, digest in sorted(models)
            ],
        }


def _model(name: str, digest: str, announcements: list[Announcement]) -> Json:
    replicas = [replica_of(a) for a in announcements]
    missing = missing_layers(replicas)
    try:
        chain = [stage.peer_id for stage in choose_chain(replicas, model_name=name).stages]
    except ShardmeshError:
        chain = []
    stages: dict[tuple[int, int], list[str]] = {}
    for a in announcements:
        if a.capabilities.shard_loaded:
            stages.setdefault((a.layer_start, a.layer_end), []).append(a.peer_id)
    return {
        "model_name": name,
        "manifest_digest": digest,
        "n_layer": replicas[0].n_layer,
        "complete": not missing and bool(chain),
        "missing_layers": missing,
        "chain": chain,
        "stages": [
            {"layer_start": start, "layer_end": end, "replicas": peer_ids}
            for (start, end), peer_ids in sorted(stages.items())
        ],
    }


def shard_of(announcement: Announcement) -> Json:
    """Which part of which model a node serves."""
    return {
        "model_name": announcement.model_name,
        "shard_id": announcement.shard_id,
        "total_shards": announcement.total_shards,
        "layer_start": announcement.layer_start,
        "layer_end": announcement.layer_end,
        "total_layers": announcement.total_layers,
        "loaded": announcement.capabilities.shard_loaded,
    }


def capabilities_of(announcement: Announcement) -> Json:
    """What a node has and can do, as it announces it."""
    given = announcement.capabilities
    return {name: getattr(given, name) for name in given.__struct_fields__}


def resources(disk: Path) -> Json:
    """This machine at the moment; sizes in MiB."""
    memory, process = psutil.virtual_memory(), psutil.Process()
    usage = psutil.disk_usage(str(disk if disk.exists() else Path.cwd()))
    return {
        "cpu_cores": psutil.cpu_count() or 1,
        "load_average": [round(each, 2) for each in os.getloadavg()],
        "memory_mb": int(memory.total // MIB),
        "memory_available_mb": int(memory.available // MIB),
        "process_memory_mb": round(process.memory_info().rss / MIB, 1),
        "disk_free_mb": int(usage.free // MIB),
        "disk_mb": int(usage.total // MIB),
    }
