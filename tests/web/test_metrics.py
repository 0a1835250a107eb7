"""`/metrics` as Prometheus reads it, and held against its rules for names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.roster import LAYERS, announced, peer_id_of_number

from shardmesh.coordinator.timings import Step, Timings
from shardmesh.web.events import EventHub
from shardmesh.web.mesh_figures import MeshFigures
from shardmesh.web.metrics import SERIES_MAX, Metrics
from shardmesh.web.queue import ModelQueue
from shardmesh.web.roster import Download, Report
from shardmesh.wire.messages import StageTiming
from shardmesh.wire.node_identity import NodeIdentity

MODEL = "fairy tales"
TIMINGS = Timings(
    n_prompt_tokens=5,
    n_reused_tokens=0,
    n_tokens=3,
    first_token_s=0.2,
    total_s=0.25,
    decode_tokens_per_s=40.0,
    first_hop_ms=1.0,
    stages=(),
)
STEP = Step(
    elapsed_us=10_000,
    first_hop_us=100,
    stages=[
        StageTiming(layer_start=s, layer_end=e, queue_us=100, compute_us=1000, next_hop_us=200)
        for s, e in LAYERS
    ],
)
PEERS = [peer_id_of_number(number) for number in range(4)]
DOWNLOAD = Download(name="shard-0.gguf", n_bytes=100, n_bytes_done=40, bytes_per_s=5.0)


@pytest.fixture
def metrics() -> Metrics:
    """A gateway that has done something of each kind."""
    metrics, hub = Metrics("gateway"), EventHub()
    hub.tell(metrics.event)
    queue = ModelQueue()
    queue.n_running = 2
    reports = {PEERS[0]: Report(n_kv_tokens=700, round_trip_ms=2.0, downloads=(DOWNLOAD,))}
    metrics.add(
        MeshFigures(
            "gateway",
            NodeIdentity(uuid="", name="cellar"),
            announcements=lambda: [announced(number) for number in range(4)],
            reports=reports,
            queues={MODEL: queue},
        )
    )
    metrics.started(MODEL)
    metrics.token(MODEL)
    metrics.step(MODEL, PEERS, STEP, [1.0, 2.0, 2.0, 2.0, 2.0])
    metrics.left(MODEL)
    metrics.finished(MODEL, 5, TIMINGS)
    metrics.failed(MODEL, "BUSY")
    metrics.cancelled(MODEL)
    hub.publish("session.recovered", data={"model_name": MODEL})
    for kind in ("download.started", "download.finished", "download.failed"):
        hub.publish(kind, data={"model_name": MODEL, "peer_id": PEERS[0]})
    return metrics


def read(metrics: Metrics, name: str, **labels: str) -> list[float]:
    """The values of all samples of a name that have these labels."""
    families = text_string_to_metric_families(metrics.text().decode())
    return [
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]


def test_names_follow_the_rules_of_prometheus(metrics: Metrics) -> None:
    """What `promtool check metrics` would say, as far as names and types go."""
    for family in text_string_to_metric_families(metrics.text().decode()):
        name = family.name
        assert re.fullmatch(r"(shardmesh|llm_model|process)_[a-z0-9_]+", name), name
        assert family.documentation, name
        assert family.type in ("counter", "gauge", "histogram"), name
        assert not re.search(r"_(ms|us|mb|millis|milliseconds|kb|minutes|hours)(_|$)", name), name
        assert not re.search(rf"_{family.type}$", name), "a type is not part of a name"
        suffix = {"counter": "_total", "gauge": "", "histogram": "(_bucket|_sum|_count)"}
        for sample in family.samples:
            assert re.fullmatch(name + suffix[family.type], sample.name)
            assert all(re.fullmatch("[a-z][a-z_]*", label) for label in sample.labels)
            if not name.startswith("process_"):
                assert "node" in sample.labels, name
        if family.type == "gauge":
            assert not name.endswith(("_total", "_count", "_sum", "_bucket", "_created")), name


def test_what_was_counted(metrics: Metrics) -> None:
    own = {"node": "gateway", "model": MODEL}
    for outcome in ("finished", "failed", "cancelled"):
        assert read(metrics, "shardmesh_requests_total", **own, outcome=outcome) == [1]
    assert read(metrics, "shardmesh_request_errors_total", **own, code="BUSY") == [1]
    assert read(metrics, "shardmesh_requests_running", **own) == [0]
    assert read(metrics, "shardmesh_prompt_tokens_total", **own) == [5]
    assert read(metrics, "shardmesh_generated_tokens_total", **own) == [1]
    assert read(metrics, "shardmesh_first_token_seconds_sum", **own) == [0.2]
    assert read(metrics, "shardmesh_token_seconds_sum", **own) == [0.025]
    assert read(metrics, "shardmesh_recoveries_total", **own) == [1]
    for outcome in ("finished", "failed"):
        labels = {"node": PEERS[0], "outcome": outcome}
        assert read(metrics, "shardmesh_downloads_total", **labels) == [1]
    for part, seconds in (("compute", 0.001), ("queue", 0.0001), ("wire", 0.002)):
        found = read(metrics, "shardmesh_stage_seconds_total", layers="1-4", part=part)
        assert found == pytest.approx([seconds])


def test_audits_are_counted_by_what_they_found() -> None:
    hub, counted = EventHub(), Metrics("gateway")
    hub.tell(counted.event)
    for outcome in ("same", "same", "differs"):
        data = {"outcome": outcome, "model_name": MODEL}
        hub.publish(f"audit.{outcome}", is_lasting=outcome != "same", data=data)
    own = {"node": "gateway", "model": MODEL}
    assert read(counted, "shardmesh_audits_total", **own, outcome="same") == [2]
    assert read(counted, "shardmesh_audits_total", **own, outcome="differs") == [1]


def test_the_names_of_the_specification(metrics: Metrics) -> None:
    own = {"node": "gateway", "model": MODEL}
    assert read(metrics, "llm_model_requests_total", **own) == [3]
    assert read(metrics, "llm_model_errors_total", **own) == [1]
    assert read(metrics, "llm_model_tokens_total", **own) == [8]
    assert read(metrics, "llm_model_latency_seconds_count", **own) == [1]


def test_how_the_mesh_stands(metrics: Metrics) -> None:
    assert read(metrics, "shardmesh_node_info", node="gateway", node_name="cellar") == [1]
    assert read(metrics, "shardmesh_nodes", loaded="yes") == [4]
    assert read(metrics, "shardmesh_model_complete", model=MODEL) == [1]
    assert read(metrics, "shardmesh_kv_sequences", model=MODEL) == [4]
    assert read(metrics, "shardmesh_kv_sequences_used", model=MODEL) == [2]
    listener = {"node": PEERS[0], "model": MODEL}
    assert read(metrics, "shardmesh_kv_tokens", **listener) == [4 * 2048]
    assert read(metrics, "shardmesh_kv_tokens_used", **listener) == [700]
    assert read(metrics, "shardmesh_round_trip_seconds", **listener) == [0.002]
    assert read(metrics, "shardmesh_downloads_running", **listener) == [1]
    assert read(metrics, "shardmesh_download_remaining_bytes", **listener) == [60]
    assert len(read(metrics, "shardmesh_kv_tokens")) == 1, "those that do not answer have none"


def test_series_that_rose_longest_ago_make_room() -> None:
    metrics = Metrics("gateway")
    one = Step(elapsed_us=1.0, first_hop_us=1.0, stages=STEP.stages[:1])
    n_stages = SERIES_MAX // 3
    for number in (*range(n_stages), 0, n_stages):
        metrics.step(MODEL, [f"node {number}"], one, [0.1, 0.1])
    found = read(metrics, "shardmesh_stage_seconds_total", part="wire")
    assert len(found) == n_stages
    assert read(metrics, "shardmesh_stage_seconds_total", node="node 0", part="wire") == [0.0002]
    assert read(metrics, "shardmesh_stage_seconds_total", node="node 1") == []


def test_codes_that_nodes_make_up_are_not_counted_without_end() -> None:
    metrics = Metrics("gateway")
    for number in range(SERIES_MAX + 5):
        metrics.failed(MODEL, f"CODE_{number}")
    assert len(read(metrics, "shardmesh_request_errors_total")) == SERIES_MAX


def test_each_figure_stands_in_the_documents(metrics: Metrics) -> None:
    document = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    for family in text_string_to_metric_families(metrics.text().decode()):
        if not family.name.startswith("process_"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            assert f"`{name}" in document, name
