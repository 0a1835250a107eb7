"""Figures of nodes that are steady to the eye: a rate over seconds, the shortest of some trips.

Pure; times are monotonic.
"""

from __future__ import annotations

from collections import deque
from typing import Final

RATE_WINDOW_S: Final = 2.0
"""Nodes are asked at different moments; over so long they show the same rate for the same text."""

RATE_SPAN_MIN_S: Final = 0.5
"""A shorter time since the first count says too little."""

TRIPS_KEPT: Final = 8
"""The shortest of them is what the way takes; the others waited for somebody's processor."""


class RateMeter:
    """Tokens per second, from a count that rises until its node starts anew."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, int]] = deque()

    def note(self, now_s: float, n_tokens: int) -> float:
        """Takes in the count of now; the rate."""
        counts = self._counts
        if counts and n_tokens < counts[-1][1]:
            counts.clear()
        counts.append((now_s, n_tokens))
        while len(counts) > 2 and counts[1][0] <= now_s - RATE_WINDOW_S:
            counts.popleft()
        begun_s, n_before = counts[0]
        span_s = now_s - begun_s
        return (n_tokens - n_before) / span_s if span_s >= RATE_SPAN_MIN_S else 0.0


class TripMeter:
    """A round trip that is measured again and again."""

    def __init__(self) -> None:
        self._trips_ms: deque[float] = deque(maxlen=TRIPS_KEPT)

    def note(self, trip_ms: float) -> float:
        """Takes in one more; the shortest of the last ones."""
        self._trips_ms.append(trip_ms)
        return min(self._trips_ms)
