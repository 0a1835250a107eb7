"""What this gateway has counted, for Prometheus; and the `llm_model_*` names beside it.

How the mesh stands is not counted but read at each scrape: `web.mesh_figures`.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from shardmesh.coordinator.timings import Step, Timings
from shardmesh.web.events import Event

CONTENT_TYPE = CONTENT_TYPE_LATEST
disable_created_metrics()  # type: ignore[no-untyped-call]  # a time beside every counter, which nobody reads

SERIES_MAX: Final = 3000
"""Of a counter whose labels other nodes choose; those that rose longest ago are dropped."""

_FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_LATENCY_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_LABELS = ("node", "model")
_DOWNLOADS = {"download.finished": "finished", "download.failed": "failed"}


class Metrics:
    """The counters of one gateway, in a registry of its own.

    The label `node` is the node that a figure is about: a listener where it served a stage or
    fetched a file, else the gateway.
    """

    def __init__(self, node: str) -> None:
        self._node = node
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(name, text, (*_LABELS, *more), registry=registry)

        def histogram(name: str, text: str, buckets_s: Sequence[float]) -> Histogram:
            return Histogram(name, text, _LABELS, buckets=buckets_s, registry=registry)

        self._requests = counter(
            "shardmesh_requests",
            "Choices that ended, by how: finished, failed or cancelled",
            "outcome",
        )
        self._errors = _Series(
            counter("shardmesh_request_errors", "Choices that failed, by error", "code")
        )
        self._running = Gauge(
            "shardmesh_requests_running",
            "Choices that are generated now",
            _LABELS,
            registry=registry,
        )
        self._prompt_tokens = counter("shardmesh_prompt_tokens", "Tokens of prompts")
        self._reused_tokens = counter(
            "shardmesh_reused_prompt_tokens", "Tokens of prompts that the stages held already"
        )
        self._tokens = counter("shardmesh_generated_tokens", "Tokens that were generated")
        self._drafts = counter("shardmesh_drafts", "Tokens that were guessed ahead")
        self._drafts_right = counter("shardmesh_drafts_right", "Of them, those that came true")
        self._first_token = histogram(
            "shardmesh_first_token_seconds",
            "From the request to its first token",
            _FIRST_TOKEN_BUCKETS_S,
        )
        self._token_time = histogram(
            "shardmesh_token_seconds",
            "Time of a token behind the first, the mean of each choice",
            _TOKEN_BUCKETS_S,
        )
        self._stage_seconds = _Series(
            counter(
                "shardmesh_stage_seconds",
                "Where the time of tokens behind the first went: compute, queue, and the wire "
                "behind the stage",
                *("layers", "part"),
            )
        )
        self._recoveries = counter(
            "shardmesh_recoveries", "Stages that were replaced while a choice was generated"
        )
        self._audits = counter(
            "shardmesh_audits",
            "Answers that another replica computed again, by what came",
            "outcome",
        )
        self._downloads = _Series(
            counter(
                "shardmesh_downloads", "Files that listeners fetched, by how that ended", "outcome"
            )
        )
        # The names of the specification, for dashboards that know them.
        self._spec_requests = counter("llm_model_requests", "Choices that ended")
        self._spec_errors = counter("llm_model_errors", "Choices that failed")
        self._spec_tokens = counter("llm_model_tokens", "Tokens of prompts and answers")
        self._spec_latency = histogram(
            "llm_model_latency_seconds", "From the request to its last token", _LATENCY_BUCKETS_S
        )
        self._tokens_of: dict[str, Counter] = {}  # looked up for every token

    def add(self, collector: Collector) -> None:
        """Figures that are made when they are asked for."""
        self.registry.register(collector)

    def started(self, model: str) -> None:
        """A choice has its session."""
        self._running.labels(self._node, model).inc()
        self._tokens_of[model] = self._tokens.labels(self._node, model)

    def token(self, model: str) -> None:
        """A started choice has one more token."""
        self._tokens_of[model].inc()

    def step(
        self, model: str, peer_ids: Sequence[str], step: Step, hops_ms: Sequence[float]
    ) -> None:
        """Where the time of a token went, stage by stage; the hops with the first one before."""
        for peer_id, timing, hop_ms in zip(peer_ids, step.stages, hops_ms[1:], strict=False):
            layers = f"{timing.layer_start}-{timing.layer_end}"
            rise = self._stage_seconds.rise
            rise(timing.compute_us / 1e6, peer_id, model, layers, "compute")
            rise(timing.queue_us / 1e6, peer_id, model, layers, "queue")
            rise(hop_ms / 1e3, peer_id, model, layers, "wire")

    def finished(self, model: str, n_prompt_tokens: int, timings: Timings) -> None:
        """A choice came to its end."""
        labels = (self._node, model)
        self._ended(model, "finished")
        self._prompt_tokens.labels(*labels).inc(n_prompt_tokens)
        self._reused_tokens.labels(*labels).inc(timings.n_reused_tokens)
        self._drafts.labels(*labels).inc(timings.n_drafts)
        self._drafts_right.labels(*labels).inc(timings.n_drafts_right)
        self._first_token.labels(*labels).observe(timings.first_token_s)
        if timings.decode_tokens_per_s:
            self._token_time.labels(*labels).observe(1 / timings.decode_tokens_per_s)
        self._spec_tokens.labels(*labels).inc(n_prompt_tokens + timings.n_tokens)
        self._spec_latency.labels(*labels).observe(timings.total_s)

    def failed(self, model: str, code: str) -> None:
        """A choice failed."""
        self._ended(model, "failed")
        self._errors.rise(1, self._node, model, code)
        self._spec_errors.labels(self._node, model).inc()

    def cancelled(self, model: str) -> None:
        """Nobody waits for a choice any more."""
        self._ended(model, "cancelled")

    def left(self, model: str) -> None:
        """A choice has given its session back, whatever its end."""
        self._running.labels(self._node, model).dec()

    def event(self, event: Event) -> None:
        """Something happened in the mesh."""
        model = str(event.data.get("model_name", ""))
        if event.kind.startswith("audit."):
            self._audits.labels(self._node, model, event.data["outcome"]).inc()
        elif event.kind == "session.recovered":
            self._recoveries.labels(self._node, model).inc()
        elif event.kind in _DOWNLOADS:
            peer_id = str(event.data.get("peer_id", ""))
            self._downloads.rise(1, peer_id, model, _DOWNLOADS[event.kind])

    def text(self) -> bytes:
        """All figures as Prometheus reads them."""
        return generate_latest(self.registry)

    def _ended(self, model: str, outcome: str) -> None:
        self._requests.labels(self._node, model, outcome).inc()
        self._spec_requests.labels(self._node, model).inc()


class _Series:
    """A counter with a bound on its series, each kept at hand: looking one up by its labels costs
    more than counting."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._known: collections.OrderedDict[tuple[str, ...], Counter] = collections.OrderedDict()

    def rise(self, amount: float, *labels: str) -> None:
        """Adds to the series with these labels."""
        known = self._known.get(labels)
        if known is None:
            known = self._known[labels] = self._counter.labels(*labels)
            if len(self._known) > SERIES_MAX:
                self._counter.remove(*self._known.popitem(last=False)[0])
        self._known.move_to_end(labels)
        known.inc(amount)
