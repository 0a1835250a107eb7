"""Where the time of a generation went."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmesh.coordinator.timings import TimingRecorder
from shardmesh.wire.messages import StageTiming


def timing(start: int, end: int, *, queue: int = 0, compute: int = 0, hop: int = 0) -> StageTiming:
    return StageTiming(
        layer_start=start, layer_end=end, queue_us=queue, compute_us=compute, next_hop_us=hop
    )


def test_a_generation_without_a_token() -> None:
    timings = TimingRecorder(7, started_s=10.0).finish(12.5)
    assert (timings.n_prompt_tokens, timings.n_tokens) == (7, 0)
    assert (timings.first_token_s, timings.total_s) == (2.5, 2.5)
    assert timings.decode_tokens_per_s is None
    assert timings.stages == ()
    assert timings.first_hop_ms == 0


def test_one_token_has_no_rate() -> None:
    recorder = TimingRecorder(1, started_s=1.0)
    recorder.token(1.5, (timing(0, 2, compute=1000),), 0)
    timings = recorder.finish(9.0)
    assert timings.first_token_s == timings.total_s == 0.5
    assert timings.decode_tokens_per_s is None


def test_stages_are_summed_and_the_way_is_divided_by_round_trips() -> None:
    recorder = TimingRecorder(3, started_s=0.0)
    recorder.token(1.0, (timing(0, 2, compute=900_000), timing(2, 4, compute=50_000)), 500)
    for number in (1, 2):
        recorder.token(
            1.0 + 0.1 * number,
            (
                timing(0, 2, queue=1000, compute=20_000, hop=1000),
                timing(2, 4, compute=30_000, hop=500),
            ),
            500,
        )
    timings = recorder.finish(5.0)
    assert timings.decode_tokens_per_s == pytest.approx(10.0)
    first, second = timings.stages
    assert (first.layer_start, first.layer_end) == (0, 2)
    assert (first.queue_ms, first.compute_ms) == pytest.approx((2.0, 40.0))
    assert (second.layer_start, second.compute_ms) == (2, pytest.approx(60.0))
    way_ms = 200 - 102  # a quarter, a half and a quarter of it
    assert timings.first_hop_ms == pytest.approx(way_ms / 4)
    assert (first.wire_ms, second.wire_ms) == pytest.approx((way_ms / 2, way_ms / 4))


def test_without_heartbeats_all_hops_count_alike() -> None:
    recorder = TimingRecorder(1, started_s=0.0)
    for number in (1, 2):
        recorder.token(0.1 * number, (timing(0, 2, compute=40_000),), 0)
    timings = recorder.finish(0.2)
    assert timings.first_hop_ms == timings.stages[0].wire_ms == pytest.approx(30.0)


@pytest.mark.parametrize("odd", [(), (timing(0, 2), timing(2, 4)), (timing(0, 3),)])
def test_a_step_that_other_stages_tell_of_is_left_out(odd: tuple[StageTiming, ...]) -> None:
    recorder = TimingRecorder(1, started_s=0.0)
    for number, stages in enumerate(((), (timing(0, 4, compute=1000),), odd)):
        recorder.token(float(number), stages, 0)
    timings = recorder.finish(2.0)
    assert [stage.compute_ms for stage in timings.stages] == [1.0]
    assert timings.n_tokens == 3


def test_a_result_that_is_taken_late_does_not_make_the_parts_more_than_the_whole() -> None:
    """Tokens go round without the coordinator, which looks at the second one late."""
    recorder = TimingRecorder(1, started_s=0.0)
    for taken_ms in (0, 10, 29, 30, *range(40, 101, 10)):
        recorder.token(taken_ms / 1e3, (timing(0, 4, compute=8000, hop=100),), 0)
    timings = recorder.finish(0.1)
    (stage,) = timings.stages
    assert (timings.first_hop_ms, stage.compute_ms) == pytest.approx((0, 80))
    assert stage.wire_ms == pytest.approx(20)


durations_us = st.integers(0, 10**7)


@given(st.lists(st.tuples(durations_us, durations_us, durations_us), min_size=2, max_size=20))
def test_the_parts_add_up_to_the_whole(steps: list[tuple[int, int, int]]) -> None:
    recorder = TimingRecorder(1, started_s=0.0)
    now_us = 0
    for compute, way, hop in steps:
        now_us += compute + way
        recorder.token(now_us / 1e6, (timing(0, 4, compute=compute, hop=hop),), hop // 2)
    timings = recorder.finish(now_us / 1e6)
    (stage,) = timings.stages
    decode_ms = (timings.total_s - timings.first_token_s) * 1e3
    parts_ms = timings.first_hop_ms + stage.compute_ms + stage.queue_ms + stage.wire_ms
    assert timings.n_tokens == len(steps)
    assert parts_ms == pytest.approx(decode_ms, abs=0.01)
