"""How far a download is: what people, GET_METRICS and the console are told."""

from __future__ import annotations

import dataclasses
from typing import Literal

DownloadState = Literal[
    "looking", "waiting", "checking", "downloading", "verifying", "done", "failed"
]
"""looking: nobody gives pieces yet; waiting: another process of this machine fetches the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownloadProgress:
    """One download at one moment."""

    model_name: str
    file_name: str
    state: DownloadState
    n_bytes_done: int
    n_bytes_total: int
    rate_bytes_per_s: int
    eta_s: float | None
    """Seconds that the rest takes at this rate; None if nobody can tell."""
    n_sources: int
    error: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedingReport:
    """All that a node gives and takes now, in bytes per second and since its start."""

    n_files: int
    n_connections: int
    upload_rate_bytes_per_s: int
    download_rate_bytes_per_s: int
    n_bytes_uploaded: int
    is_backing_off: bool


def eta_s(n_bytes_left: int, rate_bytes_per_s: int) -> float | None:
    """Seconds that the rest takes at this rate; None if it does not move."""
    if n_bytes_left <= 0:
        return 0.0
    return n_bytes_left / rate_bytes_per_s if rate_bytes_per_s > 0 else None


def readable_progress(progress: DownloadProgress) -> str:
    """One line for a log: share, size, rate, remaining time and sources."""
    share = progress.n_bytes_done / max(1, progress.n_bytes_total)
    text = f"{progress.file_name} {share:.0%} of {progress.n_bytes_total / 1e6:,.1f} MB"
    if progress.state == "downloading":
        text += f", {progress.rate_bytes_per_s / 1e6:,.1f} MB/s"
        if progress.eta_s is not None:
            text += f", {int(progress.eta_s) // 60}:{int(progress.eta_s) % 60:02d} left"
    sources = "source" if progress.n_sources == 1 else "sources"
    return f"{text}, {progress.n_sources} {sources}"
