"""Figures for Prometheus; names of their own, and the `llm_model_*` names beside them."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from shardmesh.coordinator.timings import Timings
from shardmesh.wire.messages import StageTiming

CONTENT_TYPE = CONTENT_TYPE_LATEST
disable_created_metrics()  # type: ignore[no-untyped-call]  # a time beside every counter, which nobody reads

_FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_LABELS = ("node", "model")


class Metrics:
    """The counters of one gateway, in a registry of its own."""

    def __init__(self, node: str) -> None:
        self._node = node
        self.registry = CollectorRegistry()
        registry = self.registry
        self._requests = Counter(
            "shardmesh_requests",
            "Choices by how they ended",
            (*_LABELS, "outcome"),
            registry=registry,
        )
        self._errors = Counter(
            "shardmesh_request_errors",
            "Choices that failed",
            (*_LABELS, "code"),
            registry=registry,
        )
        self._running = Gauge(
            "shardmesh_requests_running",
            "Choices that are generated now",
            _LABELS,
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "shardmesh_prompt_tokens", "Tokens of prompts", _LABELS, registry=registry
        )
        self._tokens = Counter(
            "shardmesh_generated_tokens", "Tokens generated", _LABELS, registry=registry
        )
        self._first_token = Histogram(
            "shardmesh_first_token_seconds",
            "From the request to its first token",
            _LABELS,
            buckets=_FIRST_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self._token_time = Histogram(
            "shardmesh_token_seconds",
            "Mean time of a token behind the first, by choice",
            _LABELS,
            buckets=_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self._stage_seconds = Counter(
            "shardmesh_stage_seconds",
            "Where the time of tokens went",
            (*_LABELS, "layers", "what"),
            registry=registry,
        )
        self._repairs = Counter(
            "shardmesh_recoveries", "Stages that were replaced", _LABELS, registry=registry
        )
        self._mesh = {
            name: Gauge(f"shardmesh_{name}", text, labels, registry=registry)
            for name, text, labels in (
                ("requests_waiting", "Choices that wait for a place", _LABELS),
                ("nodes", "Listeners known, by whether their shard is loaded", ("node", "loaded")),
                ("model_complete", "1 if every layer is served", _LABELS),
                ("kv_sequences", "Sequences that the stages of a model hold at most", _LABELS),
                ("kv_sequences_used", "Sequences that this gateway uses", _LABELS),
            )
        }
        # The names of the specification, for dashboards that know them.
        self._spec_requests = Counter("llm_model_requests", "Choices", _LABELS, registry=registry)
        self._spec_errors = Counter(
            "llm_model_errors", "Choices that failed", _LABELS, registry=registry
        )
        self._spec_tokens = Counter(
            "llm_model_tokens", "Tokens of prompts and answers", _LABELS, registry=registry
        )
        self._spec_latency = Histogram(
            "llm_model_latency_seconds",
            "From the request to its last token",
            _LABELS,
            buckets=_FIRST_TOKEN_BUCKETS_S,
            registry=registry,
        )

    def started(self, model: str) -> None:
        """A choice has its session."""
        self._running.labels(self._node, model).inc()
        self._spec_requests.labels(self._node, model).inc()

    def token(self, model: str, stages: Sequence[StageTiming]) -> None:
        """A token came, and where its time went."""
        self._tokens.labels(self._node, model).inc()
        for stage in stages:
            layers = f"{stage.layer_start}-{stage.layer_end}"
            add = self._stage_seconds.labels
            add(self._node, model, layers, "compute").inc(stage.compute_us / 1e6)
            add(self._node, model, layers, "queue").inc(stage.queue_us / 1e6)
            add(self._node, model, layers, "wire").inc(stage.next_hop_us / 1e6)

    def finished(self, model: str, n_prompt_tokens: int, timings: Timings) -> None:
        """A choice came to its end."""
        labels = (self._node, model)
        self._requests.labels(*labels, "finished").inc()
        self._prompt_tokens.labels(*labels).inc(n_prompt_tokens)
        self._first_token.labels(*labels).observe(timings.first_token_s)
        if timings.decode_tokens_per_s:
            self._token_time.labels(*labels).observe(1 / timings.decode_tokens_per_s)
        self._spec_tokens.labels(*labels).inc(n_prompt_tokens + timings.n_tokens)
        self._spec_latency.labels(*labels).observe(timings.total_s)

    def failed(self, model: str, code: str) -> None:
        """A choice failed."""
        self._requests.labels(self._node, model, "failed").inc()
        self._errors.labels(self._node, model, code).inc()
        self._spec_errors.labels(self._node, model).inc()

    def cancelled(self, model: str) -> None:
        """Nobody waits for a choice any more."""
        self._requests.labels(self._node, model, "cancelled").inc()

    def left(self, model: str) -> None:
        """A choice has given its session back, whatever its end."""
        self._running.labels(self._node, model).dec()

    def repaired(self, model: str) -> None:
        """A stage was replaced while a choice was generated."""
        self._repairs.labels(self._node, model).inc()

    def set(self, name: str, value: float, *labels: str) -> None:
        """Sets a figure of the mesh as it is now; labels after the node."""
        self._mesh[name].labels(self._node, *labels).set(value)

    def text(self) -> bytes:
        """All figures as Prometheus reads them."""
        return generate_latest(self.registry)
