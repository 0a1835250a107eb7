from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from shardmesh.errors import ProtocolError
from shardmesh.swarm.torrents.progress import DownloadProgress
from shardmesh.web.node_reports import DOWNLOADS_SHOWN_MAX, report_of

PROGRESS = DownloadProgress(
    model_name="fairy tales",
    file_name="shard-2.gguf",
    state="downloading",
    n_bytes_done=40,
    n_bytes_total=100,
    rate_bytes_per_s=7,
    eta_s=8.5,
    n_sources=2,
)
METRICS: dict[str, Any] = {
    "uptime_s": 5.0,
    "shard_state": "loaded",
    "shard_error": None,
    "n_sessions": 3,
    "data_memory_bytes": 1 << 20,
    "stage": {"n_tokens": 70, "queue_us": 1},
    "downloads": [dataclasses.asdict(PROGRESS)],
    "commands": {},
}


def test_an_answer_as_a_report() -> None:
    report, n_tokens = report_of(METRICS, 1.23)
    assert n_tokens == 70
    assert (report.round_trip_ms, report.n_sessions, report.shard_state) == (1.23, 3, "loaded")
    (download,) = report.downloads
    assert (download.name, download.n_bytes, download.n_bytes_done) == ("shard-2.gguf", 100, 40)
    assert (download.remaining_s, download.n_sources, download.state) == (8.5, 2, "downloading")


@pytest.mark.parametrize(
    "changes",
    [
        {"shard_state": 7},
        {"n_sessions": -1},
        {"n_sessions": 2**60},
        {"shard_error": "e" * 5000},
        {"downloads": [{"file_name": "a"}]},
        {"stage": []},
    ],
)
def test_rubbish_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        report_of(METRICS | changes, 1.0)


@pytest.mark.parametrize("answer", [None, [], "text", {}])
def test_no_answer_is_refused(answer: object) -> None:
    with pytest.raises(ProtocolError):
        report_of(answer, 1.0)


def test_counters_of_other_types_are_passed_over() -> None:
    report, n_tokens = report_of(METRICS | {"stage": {"n_tokens": "many"}}, 1.0)
    assert n_tokens == 0
    assert report.n_kv_tokens is None


def test_downloads_are_bounded() -> None:
    many = METRICS | {"downloads": METRICS["downloads"] * 500}
    assert len(report_of(many, 1.0)[0].downloads) == DOWNLOADS_SHOWN_MAX
