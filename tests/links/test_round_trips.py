"""How far away the other side of a link is, as its pings tell."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmesh.links.round_trips import N_KEPT, N_UNANSWERED_MAX, RoundTrips
from shardmesh.wire.limits import HEARTBEAT_INTERVAL_S


def test_the_greeting_counts_until_shorter_ones_are_known() -> None:
    trips = RoundTrips()
    assert trips.shortest_s == 0.0
    trips.greeted(0.4)  # something was lost
    assert trips.shortest_s == 0.4
    trips.answered(trips.next_ping(1.0), 1.1)
    assert trips.shortest_s == pytest.approx(0.1)


def test_a_pong_to_no_ping_and_a_second_one_say_nothing() -> None:
    trips = RoundTrips()
    number = trips.next_ping(0.0)
    trips.answered(number + 1, 0.01)
    assert trips.shortest_s == 0.0
    trips.answered(number, 0.2)
    trips.answered(number, 0.1)
    assert trips.shortest_s == 0.2


@given(st.floats(0.001, 5.0), st.integers(1, 100))
def test_any_distance_is_measured(round_trip_s: float, n_pings: int) -> None:
    """Also one of several heartbeats, where many pings are on their way at once."""
    trips, sent = RoundTrips(), dict[int, float]()
    for beat in range(n_pings):
        now_s = beat * HEARTBEAT_INTERVAL_S
        for number, sent_s in list(sent.items()):
            if sent_s + round_trip_s <= now_s:
                trips.answered(number, sent.pop(number) + round_trip_s)
        sent[trips.next_ping(now_s)] = now_s
    is_answered = (n_pings - 1) * HEARTBEAT_INTERVAL_S >= round_trip_s
    assert trips.shortest_s == pytest.approx(round_trip_s if is_answered else 0.0)


def test_only_the_last_ones_count_and_old_pings_are_forgotten() -> None:
    trips = RoundTrips()
    first = trips.next_ping(0.0)
    for _ in range(N_UNANSWERED_MAX):
        trips.next_ping(0.0)
    trips.answered(first, 0.01)
    assert trips.shortest_s == 0.0
    trips.answered(trips.next_ping(1.0), 1.1)
    for _ in range(N_KEPT):  # it is farther away now
        trips.answered(trips.next_ping(2.0), 2.3)
    assert trips.shortest_s == pytest.approx(0.3)
