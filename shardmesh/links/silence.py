"""When the silence of the other side of a link is suspicious.  Pure: times come from the caller.

Both sides speak at least every HEARTBEAT_INTERVAL_S.  How late that arrives depends on the network
and on how busy both machines are, so the patience grows with the longest delay heard of late.  On a
quiet machine and a good network it is SILENCE_SUSPECTED_S.
"""

from __future__ import annotations

from collections import deque

from shardmesh.wire.limits import (
    HEARTBEAT_INTERVAL_S,
    HEARTBEAT_TIMEOUT_S,
    SILENCE_SUSPECTED_S,
)

DELAYS_MULTIPLE = 6.0
"""TCP sends a lost packet again after growing pauses: lost three times, it comes seven times as
late as lost once."""

ROUND_TRIPS_MULTIPLE = 21.0
"""Far away packets are lost now and then.  The first pause of TCP is three round trips, the next
ones six and twelve, so a packet that is lost three times comes 21 round trips late.  That may
happen before any delay was heard."""

MEMORY_S = 120.0
"""How long a delay is remembered."""

N_PAUSES_MAX = 64
OWN_DELAY_S = 2 * HEARTBEAT_INTERVAL_S
"""A check that comes so late says that this process was held up, not the other one."""


class SilenceWatch:
    """What was heard of the other side, and when it has been quiet for too long."""

    def __init__(self, now_s: float) -> None:
        self._heard_s = now_s
        self._checked_s = now_s
        self._pauses: deque[tuple[float, float]] = deque()  # (when it ended, its length), falling

    def heard(self, now_s: float) -> None:
        """Something arrived."""
        pause_s = now_s - self._heard_s
        self._heard_s = now_s
        if now_s - self._checked_s > OWN_DELAY_S:
            return  # our own pause
        while self._pauses and self._pauses[-1][1] <= pause_s:
            self._pauses.pop()
        if len(self._pauses) < N_PAUSES_MAX:
            self._pauses.append((now_s, pause_s))

    def silence_s(self, now_s: float) -> float:
        """How long nothing was heard, as far as this process was there to hear it.

        To be asked at least every HEARTBEAT_INTERVAL_S: after a longer gap of our own the silence
        begins anew, since what arrived meanwhile has not been read yet.
        """
        if now_s - self._checked_s > OWN_DELAY_S:
            self._heard_s = max(self._heard_s, now_s)
        self._checked_s = now_s
        return now_s - self._heard_s

    def patience_s(self, now_s: float, round_trip_s: float = 0.0) -> float:
        """Silence beyond which the other side is suspected."""
        while self._pauses and self._pauses[0][0] < now_s - MEMORY_S:
            self._pauses.popleft()
        longest_s = self._pauses[0][1] if self._pauses else 0.0
        delay_s = max(0.0, longest_s - HEARTBEAT_INTERVAL_S)
        allowed_s = max(DELAYS_MULTIPLE * delay_s, ROUND_TRIPS_MULTIPLE * round_trip_s)
        return min(SILENCE_SUSPECTED_S + allowed_s, HEARTBEAT_TIMEOUT_S)
