"""Who sends what again, and whom to blame: pure decisions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.replicas import replica

from shardmesh.coordinator.recovery import (
    Held,
    HopStrikes,
    is_replaceable,
    late_stage,
    plan_replay,
)
from shardmesh.coordinator.replacements import (
    ASIDE_MAX_S,
    ASIDE_MIN_S,
    ASIDE_SHORT_S,
    FORGIVEN_AFTER_S,
    ReplicaHealth,
    candidates,
)
from shardmesh.errors import BusyError, EngineError, InputError, UnreachableError
from shardmesh.wire.messages import HopFailed

LOST = UnreachableError("gone", code="LINK_LOST")


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[Held], int]:
    """What the stages of a chain may have: each no more than the one before has computed."""
    n_before = draw(st.integers(0, 100))
    held = []
    for _ in range(draw(st.integers(1, 5))):
        n_received = draw(st.integers(0, n_before))
        n_computed = draw(st.integers(0, n_received))
        held.append(Held(n_received, n_computed, draw(st.integers(0, n_computed))))
        n_before = n_computed
    n_done = draw(st.integers(0, n_before))
    for number in draw(st.sets(st.integers(0, len(held) - 1))):
        held[number] = Held(0, 0, 0)  # a replacement
    return held, n_done


@given(chains())
def test_each_stage_gets_what_it_lacks_from_one_that_has_it(chain: tuple[list[Held], int]) -> None:
    held, n_done = chain
    plan = plan_replay(held, n_done)
    assert len(plan.send_from) == len(held) + 1
    has = [0 if n in plan.restart else stage.n_received for n, stage in enumerate(held)]
    assert list(plan.send_from) == [*has, n_done]
    for number, stage in enumerate(held):
        assert (stage.kept_from > plan.send_from[number + 1]) == (number in plan.restart)


@given(chains())
def test_once_all_that_must_have_begun_anew_nobody_has_to(chain: tuple[list[Held], int]) -> None:
    held, n_done = chain
    plan = plan_replay(held, n_done)
    begun = [Held(0, 0, 0) if n in plan.restart else stage for n, stage in enumerate(held)]
    assert plan_replay(begun, n_done).restart == frozenset()


def test_only_the_stage_that_was_replaced_computes_again() -> None:
    held = [Held(96, 96, 0), Held(0, 0, 0), Held(64, 64, 0)]
    plan = plan_replay(held, n_done=64)
    assert (plan.send_from, plan.restart) == ((96, 0, 64, 64), frozenset())


def test_a_stage_is_late_when_it_has_work_and_does_none() -> None:
    before = [Held(96, 96, 0), Held(96, 64, 0), Held(64, 64, 0)]
    assert late_stage(before, before) == 1
    assert late_stage(before, [Held(96, 96, 0), Held(96, 96, 0), Held(96, 64, 0)]) is None
    assert late_stage([Held(0, 0, 0)], [Held(32, 0, 0)]) is None  # it has only just got it


def hop_failed(hop: str = "next") -> HopFailed:
    return HopFailed(
        session=bytes(16),
        epoch=0,
        hop="next" if hop == "next" else "previous",
        code="LINK_LOST",
        blame="moment",
        message="lost",
        next_step="",
    )


def test_who_sends_nonsense_is_blamed_at_once() -> None:
    assert HopStrikes().blamed(2, hop_failed("previous"), next_is_suspect=False) == 1


def test_a_lost_link_is_tried_again_then_either_end_is_blamed_in_turn() -> None:
    strikes = HopStrikes()
    blamed = [strikes.blamed(1, hop_failed(), next_is_suspect=False) for _ in range(4)]
    assert blamed == [None, 2, 1, 2]
    strikes.clear()
    assert strikes.blamed(1, hop_failed(), next_is_suspect=False) is None
    assert strikes.blamed(1, hop_failed(), next_is_suspect=True) == 2


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (LOST, True),
        (EngineError("llama.cpp said no"), True),
        (BusyError("no room"), True),
        (InputError("another shard", code="WRONG_SHARD"), True),
        (InputError("full", code="CONTEXT_FULL"), False),
    ],
)
def test_what_another_replica_might_do_better(error: Exception, expected: bool) -> None:
    assert is_replaceable(error) is expected  # type: ignore[arg-type]


def test_only_the_same_layers_of_the_same_split_with_enough_room_can_take_over() -> None:
    known = [
        replica("good"),
        replica("unloaded", shard_loaded=False),
        replica("other split", manifest_digest="e"),
        replica("other layers", layer_start=2, layer_end=4),
        replica("longer", layer_end=4),
        replica("small", n_ctx=63),
    ]
    assert [r.peer_id for r in candidates(known, replica("lost"), 64)] == ["good"]


def test_a_replica_that_fails_is_left_alone_longer_each_time() -> None:
    health, now_s = ReplicaHealth(), 100.0
    pauses = []
    for _ in range(8):
        health.failed(replica("a"), LOST, now_s)
        pause_s = next(s for s in range(200) if not health.is_aside(replica("a"), now_s + s))
        pauses.append(pause_s)
        now_s += pause_s
    assert pauses[:4] == [ASIDE_MIN_S * 2**i for i in range(4)]
    assert pauses[-1] == ASIDE_MAX_S
    assert not health.is_aside(replica("b"), 100.0)


@pytest.mark.parametrize("code", ["BUSY", "NOT_LOADED", "LINK_SILENT"])
def test_one_that_may_be_back_at_any_moment_is_asked_again_soon(code: str) -> None:
    health = ReplicaHealth()
    for now_s in (0.0, 1.0, 2.0):
        health.failed(replica("a"), UnreachableError("not now", code=code), now_s)
        assert health.is_aside(replica("a"), now_s + ASIDE_SHORT_S / 2)
        assert not health.is_aside(replica("a"), now_s + ASIDE_SHORT_S)


def test_a_full_replica_has_room_when_a_session_leaves_it_and_not_when_one_goes_on() -> None:
    health = ReplicaHealth()
    for free_again, is_aside in ((health.went_well, True), (health.has_room, False)):
        health.failed(replica("a"), BusyError("full"), 100.0)
        free_again(replica("a"))
        assert health.is_aside(replica("a"), 100.1) == is_aside
    assert health.n_failures("a") == 0


def test_silence_does_not_make_dials_longer() -> None:
    health = ReplicaHealth()
    for now_s in (0.0, 1.0, 2.0):
        health.failed(replica("a"), UnreachableError("silent", code="LINK_SILENT"), now_s)
    assert health.n_failures("a") == 0


def test_a_failure_counts_although_the_replica_said_a_moment_ago_that_it_is_full() -> None:
    health = ReplicaHealth()
    health.failed(replica("a"), LOST, 100.0)
    later_s = 100.0 + ASIDE_MIN_S
    health.failed(replica("a"), BusyError("full"), later_s)
    health.failed(replica("a"), LOST, later_s)
    assert health.n_failures("a") == 2
    assert health.is_aside(replica("a"), later_s + ASIDE_MIN_S)


def test_old_failures_are_forgiven() -> None:
    health = ReplicaHealth()
    counted = []
    for now_s in (0.0, 1.0, 2.0, 3.0 + FORGIVEN_AFTER_S):
        health.failed(replica("a"), LOST, now_s)
        counted.append(health.n_failures("a"))
    assert counted == [1, 2, 2, 1]  # the third was told while it was aside already
    later_s = 3.0 + FORGIVEN_AFTER_S + ASIDE_MIN_S
    assert not health.is_aside(replica("a"), later_s)
