from __future__ import annotations

import pytest

from shardmesh.web.meters import RATE_WINDOW_S, TRIPS_KEPT, RateMeter, TripMeter


def test_two_nodes_asked_at_different_moments_show_the_same_rate() -> None:
    """The same text, 40 tokens per second; one is asked often and at odd moments."""
    often, seldom = RateMeter(), RateMeter()
    for tick in range(100):
        now_s = tick * 0.1
        rate = often.note(now_s, int(40 * now_s))
        if tick % 10 == 0:
            other = seldom.note(now_s, int(40 * now_s))
    assert rate == pytest.approx(40, rel=0.05)
    assert other == pytest.approx(40, rel=0.05)


def test_a_moment_says_nothing() -> None:
    meter = RateMeter()
    assert meter.note(0.0, 0) == 0
    assert meter.note(0.02, 5) == 0
    assert meter.note(1.0, 50) == 50


def test_what_was_long_ago_does_not_count_any_more() -> None:
    meter = RateMeter()
    for second in range(5):
        meter.note(float(second), 100 * second)
    for step in range(1, 4):
        rate = meter.note(4 + step * RATE_WINDOW_S, 400)
    assert rate == 0


def test_a_node_that_started_anew() -> None:
    meter = RateMeter()
    meter.note(0.0, 1000)
    assert meter.note(1.0, 3) == 0
    assert meter.note(2.0, 13) == 10


def test_the_shortest_trip_of_late() -> None:
    meter = TripMeter()
    assert [meter.note(trip_ms) for trip_ms in (9.0, 7.0, 80.0, 6.0)] == [9.0, 7.0, 7.0, 6.0]
    assert [meter.note(20.0) for _ in range(TRIPS_KEPT)][-1] == 20.0
