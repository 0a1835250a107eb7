"""The expected time of a token: what nodes publish, what was seen, and how many sessions wait."""

from __future__ import annotations

import functools

import pytest
import support.replicas

from shardmesh.coordinator.chain import Chain, Replica, choose_chain
from shardmesh.coordinator.pace import (
    COORDINATOR_WEIGHT,
    FULL_US,
    HOP_US_DEFAULT,
    LAYER_US_DEFAULT,
    OTHER_ENGINE_US,
    SEEN_FOR_S,
    SeenPaces,
    TokenCosts,
    explain,
    token_costs,
)
from shardmesh.wire.messages import StageTiming

replica = functools.partial(support.replicas.replica, n_parallel=4)


def costs_of(replicas: list[Replica], **known: object) -> TokenCosts:
    nothing: dict[str, object] = {
        "seen_us": lambda peer_id: None,
        "own_hops_us": {},
        "own_sessions": {},
    }
    return token_costs(replicas, **{**nothing, **known})  # type: ignore[arg-type]


def chosen(replicas: list[Replica], **known: object) -> list[str]:
    return [r.peer_id for r in choose_chain(replicas, costs=costs_of(replicas, **known)).stages]


def test_the_faster_replica_is_taken() -> None:
    pair = [replica("slow", 0, 4, token_us=10_000), replica("fast", 0, 4, token_us=1_000)]
    assert chosen(pair) == ["fast"]


def test_what_was_seen_is_believed_more_than_what_is_published() -> None:
    pair = [replica("a", 0, 4, token_us=1_000), replica("b", 0, 4, token_us=2_000)]
    assert chosen(pair, seen_us={"a": 20_000.0}.get) == ["b"]


def test_sessions_spread_over_equal_replicas_and_a_full_one_is_the_last_choice() -> None:
    pair = [
        replica("a", 0, 4, token_us=1_000, n_sessions=1),
        replica("b", 0, 4, token_us=1_000, n_sessions=0),
    ]
    assert chosen(pair) == ["b"]
    assert chosen(pair, own_sessions={"b": 2}) == ["a"]  # not yet told by the node
    full = [replica("a", 0, 4, token_us=1, n_sessions=4), replica("b", 0, 4, token_us=100_000)]
    assert chosen(full) == ["b"]
    assert costs_of(full).stage(full[0]) > FULL_US


def test_measured_hops_count_in_both_directions_and_unknown_ones_as_the_median() -> None:
    first = replica("f", 0, 2, token_us=1_000, round_trips_us=(("near", 400), ("far", 90_000)))
    near, far = replica("near", 2, 4, token_us=3_000), replica("far", 2, 4, token_us=1_000)
    assert chosen([first, near, far]) == ["f", "near"]
    costs = costs_of([first, near, far], own_hops_us={"f": 7.0})
    assert (costs.hop(first, near), costs.hop(near, first)) == (200.0, 200.0)
    assert costs.hop(near, far) == (200.0 + 45_000.0) / 2
    assert costs_of([near]).hop(near, far) == HOP_US_DEFAULT


def test_a_token_goes_from_the_last_stage_straight_to_the_first() -> None:
    """So what is near the coordinator counts for little: one token in some dozens goes there."""
    replicas = [
        replica("f", 0, 2, token_us=1_000, round_trips_us=(("near us", 40_000), ("near f", 2_000))),
        replica("near us", 2, 4, token_us=1_000),
        replica("near f", 2, 4, token_us=1_000),
    ]
    own_hops_us = {"f": 30_000.0, "near us": 1_000.0, "near f": 30_000.0}
    assert chosen(replicas, own_hops_us=own_hops_us) == ["f", "near f"]
    first, near_us, near_f = replicas
    costs = costs_of(replicas, own_hops_us=own_hops_us)
    assert costs.turn(near_f, first) == 1_000 + COORDINATOR_WEIGHT * 60_000
    assert costs.turn(near_us, first) == 20_000 + COORDINATOR_WEIGHT * 31_000


def test_a_single_stage_sends_its_tokens_over_the_coordinator() -> None:
    pair = [replica("a", 0, 4, token_us=1_000), replica("b", 0, 4, token_us=2_000)]
    assert chosen(pair, own_hops_us={"a": 5_000.0, "b": 100.0}) == ["b"]
    costs = costs_of(pair, own_hops_us={"a": 5_000.0, "b": 100.0})
    assert costs.turn(pair[0], pair[0]) == 10_000
    # Each as if it were chosen: an alternative is not a hop behind the one that was.
    hops_us = {c.replica.peer_id: c.hop_us for c in explain([pair[1]], pair, costs).considered}
    assert hops_us == {"a": 10_000, "b": 200}


def test_who_has_said_nothing_is_taken_for_average() -> None:
    silent = replica("s", 0, 2)
    assert costs_of([silent]).stage(silent) == 2 * LAYER_US_DEFAULT
    assert costs_of([silent, replica("o", 2, 4, token_us=600)]).stage(silent) == 600


def test_neighbours_that_compute_alike_are_preferred() -> None:
    replicas = [
        replica("f", 0, 2, token_us=1_000),
        replica("other", 2, 4, token_us=1, fingerprint="g"),
        replica("same", 2, 4, token_us=50_000),
    ]
    assert chosen(replicas) == ["f", "same"]
    assert costs_of(replicas).hop(replicas[0], replicas[1]) > OTHER_ENGINE_US


def timing(compute_us: int) -> StageTiming:
    return StageTiming(layer_start=0, layer_end=4, queue_us=0, compute_us=compute_us, next_hop_us=0)


def test_a_replica_that_becomes_slow_is_known_after_some_tokens_and_forgotten_later() -> None:
    seen, stages = SeenPaces(), [replica("a", 0, 4)]
    for number in range(20):
        seen.note(stages, [timing(1_000)], 0.1 * number)
    assert seen.stage_us("a", 2.0) == pytest.approx(1_000)
    for number in range(20):
        seen.note(stages, [timing(10_000)], 2.0 + 0.1 * number)
    assert seen.stage_us("a", 4.0) > 9_000  # type: ignore[operator]
    assert seen.stage_us("a", 4.0 + SEEN_FOR_S) is None
    assert seen.stage_us("b", 4.0) is None


def test_an_explanation_adds_up_and_has_the_others_beside_the_chosen() -> None:
    replicas = [
        replica("a", 0, 2, token_us=1_000),
        replica("b", 0, 2, token_us=2_000),
        replica("c", 2, 4, token_us=500, n_sessions=1),
    ]
    costs = costs_of(replicas)
    chain = Chain((replicas[0], replicas[2]))
    found = explain(chain.stages, replicas, costs)
    assert [(c.replica.peer_id, c.is_chosen) for c in found.considered] == [
        ("a", True),
        ("b", False),
        ("c", True),
    ]
    hops_us = (2 + 2 * COORDINATOR_WEIGHT) * HOP_US_DEFAULT
    assert found.token_us == 1_000 + 2 * 500 + hops_us
    assert [c.hop_us for c in found.considered][2] == HOP_US_DEFAULT
