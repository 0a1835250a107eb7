"""How far away the other side of a link is.  Pure: times come from the caller."""

from __future__ import annotations

from collections import deque

from shardmesh.wire.limits import HEARTBEAT_INTERVAL_S, HEARTBEAT_TIMEOUT_S

N_KEPT = 8
N_UNANSWERED_MAX = round(HEARTBEAT_TIMEOUT_S / HEARTBEAT_INTERVAL_S)
"""Pings that may still be answered: a link that is silent for longer ends."""


class RoundTrips:
    """The last round trips of a link: of its greeting and of its pings."""

    def __init__(self) -> None:
        self._kept_s: deque[float] = deque(maxlen=N_KEPT)
        self._sent_s: dict[int, float] = {}  # of pings without an answer, by their numbers
        self._n_pings = 0
        self.shortest_s = 0.0
        """The shortest of the last ones, in which nothing was lost or busy; 0 before the first."""

    def greeted(self, round_trip_s: float) -> None:
        """The greeting was answered after so long."""
        self._keep(round_trip_s)

    def next_ping(self, now_s: float) -> int:
        """The number of a ping that is sent now."""
        self._n_pings += 1
        self._sent_s[self._n_pings] = now_s
        if len(self._sent_s) > N_UNANSWERED_MAX:
            del self._sent_s[next(iter(self._sent_s))]
        return self._n_pings

    def answered(self, number: int, now_s: float) -> None:
        """A pong has come; one that answers no ping says nothing."""
        sent_s = self._sent_s.pop(number, None)
        if sent_s is not None:
            self._keep(now_s - sent_s)

    def _keep(self, round_trip_s: float) -> None:
        self._kept_s.append(round_trip_s)
        self.shortest_s = min(self._kept_s)
