"""How far a download is: what people, GET_METRICS and the console are told."""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Final, Literal

PROGRESS_LOGGER: Final = "shardmesh.progress"
"""Writes how far downloads are, every few seconds; whoever draws that instead sets it quiet."""

RATE_WINDOW_S: Final = 4.0
"""Long enough to be read, short enough to be true: libtorrent's own rates are late by 10 s."""

DownloadState = Literal[
    "looking", "waiting", "checking", "downloading", "verifying", "done", "failed"
]
"""looking: nobody gives pieces yet; waiting: another process of this machine fetches the file."""

_STATE_TEXTS: Final[dict[DownloadState, str]] = {
    "looking": "looking for a node that has it",
    "waiting": "another process fetches it",
    "checking": "checking what is here already",
    "verifying": "checking the whole file",
    "done": "done",
    "failed": "failed",
}


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


class RateMeter:
    """Bytes per second over the last seconds, from a count that only rises; times are monotonic."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def note(self, now_s: float, n_bytes: int) -> int:
        """Takes in the count of now; the rate."""
        samples = self._samples
        samples.append((now_s, n_bytes))
        while len(samples) > 2 and samples[1][0] <= now_s - RATE_WINDOW_S:
            samples.popleft()
        begun_s, n_before = samples[0]
        return int((n_bytes - n_before) / (now_s - begun_s)) if now_s > begun_s else 0


def eta_s(n_bytes_left: int, rate_bytes_per_s: int) -> float | None:
    """Seconds that the rest takes at this rate; None if it does not move."""
    if n_bytes_left <= 0:
        return 0.0
    return n_bytes_left / rate_bytes_per_s if rate_bytes_per_s > 0 else None


def readable_progress(progress: DownloadProgress) -> str:
    """One line for a log: share, size, rate, remaining time and sources."""
    share = progress.n_bytes_done / max(1, progress.n_bytes_total)
    size = readable_size(progress.n_bytes_total)
    return f"{progress.file_name} {share:.0%} of {size}, {readable_rest(progress)}"


def readable_size(n_bytes: int) -> str:
    """As people write it: `198.7 MB`, `4.2 GB`."""
    unit, divisor = (
        ("GB", 1e9) if n_bytes >= 1e9 else ("MB", 1e6) if n_bytes >= 1e6 else ("kB", 1e3)
    )
    return f"{n_bytes / divisor:,.1f} {unit}"


def readable_rest(progress: DownloadProgress) -> str:
    """Rate, remaining time and sources while pieces come; else what it does instead."""
    if progress.state != "downloading":
        return _STATE_TEXTS[progress.state]
    sources = f"{progress.n_sources} source{'' if progress.n_sources == 1 else 's'}"
    parts = [f"{readable_size(progress.rate_bytes_per_s)}/s"]
    if progress.eta_s is not None:
        parts.append(f"{_clock(int(progress.eta_s))} left")
    return ", ".join([*parts, sources])


def _clock(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
