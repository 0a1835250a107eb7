"""How the mesh stands, for Prometheus: read when it is asked for, so that what is gone is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

import shardmesh
from shardmesh.coordinator.chain import missing_layers, models_of
from shardmesh.coordinator.coordinator import replica_of
from shardmesh.web.queue import ModelQueue, capacity
from shardmesh.web.roster import Report
from shardmesh.wire.announcement import Announcement
from shardmesh.wire.node_identity import NodeIdentity

_LABELS = ("node", "model")


class MeshFigures(Collector):
    """Gauges of a gateway's view; those of a listener are as old as its last answer."""

    def __init__(
        self,
        node: str,
        identity: NodeIdentity,
        *,
        announcements: Callable[[], list[Announcement]],
        reports: Mapping[str, Report],
        queues: Mapping[str, ModelQueue],
    ) -> None:
        """`node` and `identity` are the gateway's own."""
        self._node = node
        self._identity = identity
        self._announcements = announcements
        self._reports = reports
        self._queues = queues

    def collect(self) -> Iterator[Metric]:
        announcements = self._announcements()
        yield from self._of_nodes(announcements)
        yield from self._of_models(announcements)
        yield from self._of_listeners(announcements)

    def _of_nodes(self, announcements: list[Announcement]) -> Iterator[Metric]:
        info = _gauge(
            "shardmesh_node_info",
            "Always 1; says what a node is called",
            ("node", "node_name", "kind", "location", "version"),
        )
        own = self._identity
        version = shardmesh.__version__
        info.add_metric([self._node, own.name, "gateway", own.location, version], 1)
        for a in announcements:
            info.add_metric([a.peer_id, a.identity.name, "listener", a.identity.location, ""], 1)
        yield info
        n_loaded = sum(a.capabilities.shard_loaded for a in announcements)
        nodes = _gauge(
            "shardmesh_nodes", "Listeners known, by whether a shard is loaded", ("node", "loaded")
        )
        nodes.add_metric([self._node, "yes"], n_loaded)
        nodes.add_metric([self._node, "no"], len(announcements) - n_loaded)
        yield nodes

    def _of_models(self, announcements: list[Announcement]) -> Iterator[Metric]:
        complete = _gauge("shardmesh_model_complete", "1 if every layer is served, else 0")
        room = _gauge("shardmesh_kv_sequences", "Sequences that the stages of a model can hold")
        used = _gauge("shardmesh_kv_sequences_used", "Sequences of a model that this gateway uses")
        waiting = _gauge("shardmesh_requests_waiting", "Choices that wait for a sequence")
        replicas = [replica_of(a) for a in announcements if a.total_layers]
        n_parallel = {a.peer_id: a.capabilities.n_parallel for a in announcements}
        by_name: dict[str, tuple[bool, int]] = {}  # the best of several that have one name
        for (name, _), found in models_of(replicas).items():
            is_complete = not missing_layers(found)
            n_room = capacity(found, n_parallel) if is_complete else 0
            by_name[name] = max(by_name.get(name, (False, 0)), (is_complete, n_room))
        for name, (is_complete, n_room) in by_name.items():
            queue = self._queues.get(name)
            complete.add_metric([self._node, name], is_complete)
            room.add_metric([self._node, name], n_room)
            used.add_metric([self._node, name], queue.n_running if queue else 0)
            waiting.add_metric([self._node, name], queue.n_waiting if queue else 0)
        yield from (complete, room, used, waiting)

    def _of_listeners(self, announcements: list[Announcement]) -> Iterator[Metric]:
        tokens = _gauge(
            "shardmesh_kv_tokens", "Tokens that a listener has room for in its KV cache"
        )
        used = _gauge("shardmesh_kv_tokens_used", "Tokens in the KV cache of a listener")
        kept = _gauge(
            "shardmesh_kv_sequences_kept", "Free sequences of a listener that hold a prompt"
        )
        copies = _gauge("shardmesh_kv_copies", "Sessions that a listener stands by for")
        copy_bytes = _gauge("shardmesh_kv_copy_bytes", "Memory of a listener for their KV")
        sent = _gauge("shardmesh_kv_copy_sent_bytes", "KV that a listener has sent to standbys")
        sessions = _gauge("shardmesh_sessions", "Sessions on a listener, of all coordinators")
        memory = _gauge(
            "shardmesh_data_process_memory_bytes", "Memory of a listener's data process"
        )
        trip = _gauge("shardmesh_round_trip_seconds", "From this gateway to a listener and back")
        fetching = _gauge("shardmesh_downloads_running", "Files that a listener fetches now")
        missing = _gauge("shardmesh_download_remaining_bytes", "What these files still lack")
        rate = _gauge("shardmesh_download_bytes_per_second", "How fast it fetches them")
        for a in announcements:
            report = self._reports.get(a.peer_id)
            if report is None or not report.answered:
                continue
            labels = [a.peer_id, a.model_name]
            tokens.add_metric(labels, a.capabilities.n_ctx * a.capabilities.n_parallel)
            if report.n_kv_tokens is not None:
                used.add_metric(labels, report.n_kv_tokens)
            kept.add_metric(labels, report.n_sequences_kept)
            copies.add_metric(labels, report.n_copies)
            copy_bytes.add_metric(labels, report.copy_bytes)
            sent.add_metric(labels, report.copy_bytes_sent)
            sessions.add_metric(labels, report.n_sessions)
            memory.add_metric(labels, report.memory_bytes)
            if report.round_trip_ms is not None:
                trip.add_metric(labels, report.round_trip_ms / 1e3)
            under_way = [d for d in report.downloads if d.is_under_way]
            fetching.add_metric(labels, len(under_way))
            missing.add_metric(labels, sum(d.n_bytes - d.n_bytes_done for d in under_way))
            rate.add_metric(labels, sum(d.bytes_per_s for d in under_way))
        yield from (tokens, used, kept, copies, copy_bytes, sent)
        yield from (sessions, memory, trip, fetching, missing, rate)


def _gauge(name: str, text: str, labels: tuple[str, ...] = _LABELS) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=labels)
