"""The nodes of the mesh as they are shown, and what happened between two looks.  Pure.

A directory forgets a node that left or fell silent; a person wants to see that it was there, and
that it is gone.  So the roster keeps a lost node for a while, once, and lets it go when it comes
back, says goodbye, or its time is over.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from shardmesh.coordinator.chain import Replica, missing_layers, models_of
from shardmesh.coordinator.coordinator import replica_of
from shardmesh.wire.announcement import Announcement

OFFLINE_KEPT_S: Final = 15 * 60.0
"""A lost node stays in sight for so long; events remember it afterwards."""

OFFLINE_MAX: Final = 200
"""Lost nodes in sight; the longest lost goes first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Download:
    """A file that a node is fetching, or has just fetched or given up."""

    name: str
    n_bytes: int
    n_bytes_done: int
    state: str = "downloading"  # as `swarm.torrents.progress.DownloadState`
    bytes_per_s: float = 0.0
    n_sources: int = 0
    remaining_s: float | None = None  # None: unknown
    error: str = ""

    @property
    def is_under_way(self) -> bool:
        return self.state not in ("done", "failed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A node's own answer about itself, the newest one."""

    answered: bool = True
    round_trip_ms: float | None = None
    shard_state: str = "loaded"  # absent, loading, loaded, draining, failed
    error: str = ""
    n_sessions: int = 0
    memory_bytes: int = 0
    tokens_per_s: float = 0.0
    n_kv_tokens: int | None = None  # None: the node does not tell
    n_sequences_kept: int = 0  # free ones that hold a prompt
    n_copies: int = 0  # of other nodes' sessions, as their standby
    copy_bytes: int = 0  # memory of those
    copy_bytes_sent: int = 0  # of own sessions, to standbys
    downloads: tuple[Download, ...] = ()

    @property
    def is_downloading(self) -> bool:
        return any(download.is_under_way for download in self.downloads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
    """One listener as it is shown; the same object from look to look while nothing changes."""

    announcement: Announcement
    report: Report | None  # None: not asked yet
    state: str  # online, busy, draining, loading, downloading, waiting, failed, suspect, offline
    since_s: float  # in this state, wall clock

    @property
    def name(self) -> str:
        """What its owner calls it; may be empty, and others may have the same."""
        return self.announcement.identity.name

    @property
    def is_offline(self) -> bool:
        return self.state == "offline"

    @property
    def serves(self) -> bool:
        """Whether its shard counts for a chain; a silent node does until it is given up."""
        return self.announcement.capabilities.shard_loaded and self.state in (
            "online",
            "busy",
            "suspect",
        )

    @functools.cached_property
    def replica(self) -> Replica:
        """The node as the chooser of chains sees it, loaded only if it can serve now."""
        return dataclasses.replace(replica_of(self.announcement), shard_loaded=self.serves)

    @functools.cached_property
    def json(self) -> dict[str, Any]:
        """The node in the state document; not to be changed."""
        return json_of(self)


class Change(NamedTuple):
    """An event to publish: its kind, its data and, where it is known, why."""

    kind: str
    data: dict[str, Any]
    cause: str = ""


Roster = Mapping[str, Node]


def look(
    before: Roster,
    announcements: Sequence[Announcement],
    reports: Mapping[str, Report],
    *,
    now_s: float,
    left: Collection[str] = (),
    busy: Collection[str] = (),
) -> dict[str, Node]:
    """The roster now; `left` said goodbye, `busy` are known to work."""
    after: dict[str, Node] = {}
    for announcement in announcements:
        peer_id = announcement.peer_id
        report = reports.get(peer_id)
        state = state_of(announcement, report, is_busy=peer_id in busy)
        known = before.get(peer_id)
        same = known is not None and known.state == state
        node = Node(
            announcement=announcement,
            report=report,
            state=state,
            since_s=known.since_s if known is not None and same else now_s,
        )
        after[peer_id] = known if known is not None and _is_unchanged(known, node) else node
    lost = [n for p, n in before.items() if p not in after and p not in left]
    for node in _still_shown(lost, now_s):
        after[node.announcement.peer_id] = node
    return after


def _is_unchanged(known: Node, node: Node) -> bool:
    same = known.announcement is node.announcement and known.report is node.report
    return same and known.state == node.state


def state_of(announcement: Announcement, report: Report | None, *, is_busy: bool = False) -> str:
    """The state of an announced node."""
    if report is None:
        if not announcement.capabilities.shard_loaded:
            return "waiting"
        return "busy" if is_busy else "online"
    if not report.answered:
        return "suspect"
    # What it announces may be newer than its last answer, and nobody uses what is not announced.
    if report.shard_state == "loaded" and announcement.capabilities.shard_loaded:
        return "busy" if is_busy or report.n_sessions else "online"
    if report.shard_state in ("loading", "failed", "draining"):
        return report.shard_state
    return "downloading" if report.is_downloading else "waiting"


def _still_shown(lost: Iterable[Node], now_s: float) -> list[Node]:
    offline = [
        n if n.is_offline else dataclasses.replace(n, state="offline", report=None, since_s=now_s)
        for n in lost
    ]
    kept = [n for n in offline if now_s - n.since_s < OFFLINE_KEPT_S]
    return sorted(kept, key=lambda n: n.since_s)[-OFFLINE_MAX:]


def changes_between(before: Roster, after: Roster, *, left: Collection[str] = ()) -> list[Change]:
    """The events between two looks."""
    told: list[Change] = []
    for peer_id, node in after.items():
        known = before.get(peer_id)
        if known is not node:
            told += _node_changes(known, node)
    for peer_id, node in before.items():
        if peer_id not in after and peer_id in left and not node.is_offline:
            told.append(Change("node.left", describe(node), "it said goodbye"))
    return told + _completeness_changes(before, after)


def _node_changes(before: Node | None, after: Node) -> list[Change]:
    data = describe(after)
    if before is None:
        loaded = [Change("shard.loaded", data)] if after.serves else []
        return [Change("node.joined", data), *loaded]
    if before.state == after.state:
        return _download_changes(before, after)
    if after.is_offline:
        return [Change("node.lost", data, "no goodbye: its connection broke or it fell silent")]
    if before.is_offline:
        return [Change("node.returned", data)]
    kind = _kind_of_step(before, after)
    cause = after.report.error if after.report is not None and kind == "shard.failed" else ""
    return [*([Change(kind, data, cause)] if kind else []), *_download_changes(before, after)]


def _kind_of_step(before: Node, after: Node) -> str | None:
    """The event that a new state is, None for none of interest."""
    if after.state == "failed":
        return "shard.failed"
    if after.state == "suspect":
        return "node.silent"
    if after.state == "loading":
        return "shard.loading"
    if before.state == "suspect":
        return "node.answers"
    if after.serves and not before.serves:
        return "shard.loaded"
    return "shard.unloaded" if before.serves and not after.serves else None


def _download_changes(before: Node, after: Node) -> list[Change]:
    if after.report is None or not after.report.answered:
        return []
    knew = before.report is not None and before.report.answered
    had = {d.name: d for d in before.report.downloads} if before.report is not None else {}
    has = {d.name: d for d in after.report.downloads}
    told = []
    for name in sorted({*had, *has}):
        old, new = had.get(name), has.get(name)
        was_under_way = old is not None and old.is_under_way
        has_ended = was_under_way or (knew and old is None)  # between two looks, if it was quick
        data = describe(after) | {"file": name}
        if new is not None and new.is_under_way and not was_under_way:
            told.append(Change("download.started", data | {"n_bytes": new.n_bytes}))
        elif new is not None and new.state == "done" and has_ended:
            told.append(Change("download.finished", data | {"n_bytes": new.n_bytes}))
        elif new is not None and new.state == "failed" and has_ended:
            told.append(Change("download.failed", data, new.error))
        elif new is None and was_under_way:
            told.append(Change("download.ended", data))
    return told


def _completeness_changes(before: Roster, after: Roster) -> list[Change]:
    was, now = gaps(before), gaps(after)
    told = []
    for key, missing in now.items():
        data: dict[str, Any] = {"model_name": key[0]}
        if not missing and was.get(key) != []:
            told.append(Change("model.complete", data))
        elif missing and was.get(key) == []:
            told.append(Change("model.incomplete", data | {"missing_layers": missing}))
    return told + [Change("model.gone", {"model_name": key[0]}) for key in was.keys() - now.keys()]


def describe(node: Node) -> dict[str, Any]:
    """What an event tells of a node."""
    a = node.announcement
    return {
        "peer_id": a.peer_id,
        "name": node.name,
        "model_name": a.model_name,
        "shard_id": a.shard_id,
        "layer_start": a.layer_start,
        "layer_end": a.layer_end,
        "shard_loaded": node.serves,
    }


def gaps(roster: Roster) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """Layer ranges that nobody serves, by (model name, manifest digest)."""
    found = models_of(n.replica for n in roster.values() if n.replica.n_layer > 0)
    return {key: missing_layers(replicas) for key, replicas in found.items()}


def json_of(node: Node) -> dict[str, Any]:
    """A node in the state document; what is unknown is left out."""
    a, c, r = node.announcement, node.announcement.capabilities, node.report
    shown: dict[str, Any] = {
        "name": node.name or None,
        "location": a.identity.location or None,
        "tags": list(a.identity.tags) or None,
        "state": node.state,
        "since_s": round(node.since_s, 1),
        "model": a.manifest_digest if a.total_layers else None,
        "shard_id": a.shard_id,
        "layer_start": a.layer_start,
        "layer_end": a.layer_end,
        "memory_mb": c.memory_mb,
        "memory_available_mb": c.memory_available_mb,
        "cpu_cores": c.cpu_cores,
        "gpu": c.gpu_available,
        "n_ctx": c.n_ctx,
        "n_parallel": c.n_parallel,
        "addresses": list(a.addresses),
        "fingerprint": a.engine_fingerprint,
    }
    if r is not None:
        shown |= {
            "round_trip_ms": r.round_trip_ms,
            "n_sessions": r.n_sessions,
            "process_memory_mb": round(r.memory_bytes / 2**20),
            "tokens_per_s": round(r.tokens_per_s, 1),
            "n_kv_tokens": r.n_kv_tokens,
            "error": r.error or None,
            "downloads": {d.name: _download_json(d) for d in r.downloads if d.state != "done"}
            or None,
        }
    return {key: value for key, value in shown.items() if value is not None}


def _download_json(download: Download) -> dict[str, Any]:
    fields = dataclasses.asdict(download)
    del fields["name"]
    fields["bytes_per_s"] = round(download.bytes_per_s)
    return {key: value for key, value in fields.items() if value not in (None, "")}
