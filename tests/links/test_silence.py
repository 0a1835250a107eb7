"""Patience with the other side of a link, and what a link makes of silence."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from support.far_end import Recorder
from support.mesh import GatedStream, linked_pair

from shardmesh.links.silence import MEMORY_S, OWN_DELAY_S, SilenceWatch
from shardmesh.wire.limits import (
    HEARTBEAT_INTERVAL_S,
    HEARTBEAT_TIMEOUT_S,
    SILENCE_SUSPECTED_S,
)

CHECK_S = 0.05


def hear(
    watch: SilenceWatch, times_s: list[float], until_s: float, round_trip_s: float = 0.0
) -> list[float]:
    """Feeds what is heard and checks all the while; when the other side came under suspicion."""
    alarms, heard, is_suspected = [], list(times_s), False
    for number in range(int(until_s / CHECK_S)):
        now_s = number * CHECK_S
        while heard and heard[0] <= now_s:
            watch.heard(heard.pop(0))
        was_suspected = is_suspected
        is_suspected = watch.silence_s(now_s) > watch.patience_s(now_s, round_trip_s)
        if is_suspected and not was_suspected:
            alarms.append(now_s)
    return alarms


def test_a_steady_side_that_stops_is_suspected_within_a_second() -> None:
    beats = [number * HEARTBEAT_INTERVAL_S for number in range(40)]
    suspected = hear(SilenceWatch(0.0), beats, beats[-1] + 5)
    assert SILENCE_SUSPECTED_S < suspected[0] - beats[-1] < 1.0


def lossy_arrivals(seed: int, until_s: float) -> list[float]:
    """Heartbeats over 100 ms with 10 % loss.

    TCP sends what is lost again after 0.3 s, 0.6 s, 1.2 s, and what follows waits for it.  Often it
    knows earlier; this is the worst.
    """
    generator = random.Random(seed)
    arrivals, ready_s = [], 0.0
    for number in range(int(until_s / HEARTBEAT_INTERVAL_S)):
        delay_s, again_s = 0.05 + generator.uniform(0, 0.01), 0.3
        while generator.random() < 0.1:
            delay_s, again_s = delay_s + again_s, again_s * 2
        ready_s = max(ready_s, number * HEARTBEAT_INTERVAL_S + delay_s)
        arrivals.append(ready_s)
    return arrivals


def test_ten_percent_loss_and_a_long_way_raise_an_alarm_in_hours_only() -> None:
    alarms = [hear(SilenceWatch(0.0), lossy_arrivals(seed, 600), 600, 0.1) for seed in range(20)]
    assert sum(len(each) for each in alarms) <= 1  # in 200 minutes; a packet was lost four times


@pytest.mark.parametrize("round_trip_s", [0.1, 0.2, 0.4])
def test_a_packet_lost_three_times_in_the_first_second_raises_no_alarm(round_trip_s: float) -> None:
    """TCP waits for three round trips at first, then twice and four times as long."""
    greeted = [round_trip_s, round_trip_s + HEARTBEAT_INTERVAL_S]
    late_s = greeted[-1] + HEARTBEAT_INTERVAL_S + 7 * 3 * round_trip_s
    watch = SilenceWatch(0.0)
    assert hear(watch, [*greeted, late_s], late_s + CHECK_S, round_trip_s) == []


@given(st.lists(st.floats(0, 10), max_size=50))
def test_patience_has_bounds(pauses_s: list[float]) -> None:
    watch, now_s = SilenceWatch(0.0), 0.0
    for pause_s in pauses_s:
        now_s += pause_s
        watch.silence_s(now_s)
        watch.heard(now_s)
        assert SILENCE_SUSPECTED_S <= watch.patience_s(now_s) <= HEARTBEAT_TIMEOUT_S


def test_a_long_pause_is_forgotten_after_a_while() -> None:
    watch = SilenceWatch(0.0)
    hear(watch, [0.75], 0.8)
    assert watch.patience_s(0.8) == pytest.approx(SILENCE_SUSPECTED_S + 3.0)
    assert watch.patience_s(0.8 + MEMORY_S) == SILENCE_SUSPECTED_S


def test_a_process_that_was_held_up_itself_blames_nobody() -> None:
    watch = SilenceWatch(0.0)
    assert watch.silence_s(0.1) == pytest.approx(0.1)
    assert watch.silence_s(0.1 + OWN_DELAY_S + 30) == 0.0
    watch.heard(30.7)  # what had come meanwhile
    assert watch.patience_s(30.7) == SILENCE_SUSPECTED_S


async def test_a_frozen_side_is_suspected_then_given_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    thawed = trio.Event()
    thawed.set()
    near_user, far_user = Recorder(), Recorder()
    one, other = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        near, _ = await linked_pair(
            nursery,
            near_user,
            far_user,
            names=("near", "far"),
            streams=(one, GatedStream(other, lambda: thawed)),
        )
        await trio.sleep(5)
        assert not near.is_suspected
        thawed = trio.Event()
        await trio.sleep(1)
        assert (near.is_suspected, near_user.n_suspicions) == (True, 1)
        thawed.set()
        await trio.sleep(0.5)
        assert not near.is_suspected
        thawed = trio.Event()
        with trio.fail_after(HEARTBEAT_TIMEOUT_S + 1):
            assert (await near_user.end()).code == "LINK_SILENT"
        assert not near.is_open
        nursery.cancel_scope.cancel()
