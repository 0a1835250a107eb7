"""How busy a node is: asked of the data process, often while it has sessions; told on a change."""

from __future__ import annotations

import dataclasses

from shardmesh.listener.local_messages import Metrics
from shardmesh.wire.limits import ROUND_TRIPS_MAX

CHANGE_MIN = 0.2
"""A smaller part of a time is noise; telling all neighbours of it would cost more than it gives."""

ROUND_TRIP_CHANGE_MIN_US = 200


@dataclasses.dataclass(frozen=True)
class Load:
    """What an announcement says of it."""

    n_sessions: int = 0
    token_us: int = 0
    round_trips_us: tuple[tuple[str, int], ...] = ()

    def differs(self, told: Load) -> bool:
        """Whether others should hear of it, who know what was `told`."""
        trips, told_trips = dict(self.round_trips_us), dict(told.round_trips_us)
        return (
            self.n_sessions != told.n_sessions
            or abs(self.token_us - told.token_us) > CHANGE_MIN * told.token_us
            or trips.keys() != told_trips.keys()
            or any(
                abs(us - told_trips[peer]) > max(ROUND_TRIP_CHANGE_MIN_US, told_trips[peer] / 2)
                for peer, us in trips.items()
            )
        )


def load_of(metrics: Metrics | None) -> Load:
    """The load in a data process's figures; idle without one."""
    if metrics is None:
        return Load()
    trips = {link.peer_id: link.round_trip_us for link in metrics.links if link.round_trip_us}
    return Load(
        n_sessions=metrics.n_sessions,
        token_us=metrics.counters.get("token_us", 0),
        round_trips_us=tuple(sorted(trips.items())[:ROUND_TRIPS_MAX]),
    )
