"""Choosing a chain: as cheap as the best of all combinations, or an error that names what lacks."""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Sequence

import pytest
import support.replicas
from hypothesis import given
from hypothesis import strategies as st

from shardmesh.coordinator.chain import Costs, Replica, choose_chain, missing_layers, pinned
from shardmesh.errors import IncompleteError, InputError

N_LAYER = 5


replica = functools.partial(support.replicas.replica, n_layer=N_LAYER)

ranges = st.tuples(st.integers(0, N_LAYER - 1), st.integers(1, N_LAYER)).filter(
    lambda r: r[0] < r[1]
)


class Priced:
    """A price for each node, and one for each pair of neighbours that follows from their names."""

    def __init__(self, cost: dict[str, float]) -> None:
        self._cost = cost

    def stage(self, replica: Replica) -> float:
        return self._cost[replica.peer_id]

    def hop(self, before: Replica, after: Replica) -> float:
        names = f"{before.peer_id} {after.peer_id}"
        return zlib.crc32(names.encode()) % 7

    def turn(self, last: Replica, first: Replica) -> float:
        return zlib.crc32(f"{last.peer_id} to {first.peer_id}".encode()) % 11


def price(stages: Sequence[Replica], costs: Costs) -> float:
    found = costs.turn(stages[-1], stages[0])
    for number, stage in enumerate(stages):
        found += costs.stage(stage) + (costs.hop(stages[number - 1], stage) if number else 0.0)
    return found


@st.composite
def meshes(draw: st.DrawFn) -> tuple[list[Replica], dict[str, float]]:
    """Replicas of up to two models, of two splits each, and what each costs."""
    found = draw(
        st.lists(
            st.tuples(ranges, st.sampled_from("mn"), st.sampled_from("de"), st.booleans()),
            max_size=7,
        )
    )
    replicas = [
        replica(
            f"p{i}",
            start,
            end,
            model_name=model,
            manifest_digest=digest,
            shard_loaded=loaded or i % 3 > 0,
        )
        for i, ((start, end), model, digest, loaded) in enumerate(found)
    ]
    return replicas, {r.peer_id: float(draw(st.integers(0, 5))) for r in replicas}


def all_chains(replicas: Sequence[Replica]) -> list[tuple[Replica, ...]]:
    """Every order of every subset that covers all layers once with one split."""
    return [
        stages
        for n in range(1, N_LAYER + 1)
        for stages in itertools.permutations([r for r in replicas if r.shard_loaded], n)
        if stages[0].layer_start == 0
        and stages[-1].layer_end == N_LAYER
        and all(a.layer_end == b.layer_start for a, b in itertools.pairwise(stages))
        and len({(r.model_name, r.manifest_digest) for r in stages}) == 1
    ]


@given(meshes(), st.sampled_from([None, "m"]))
def test_the_chain_is_the_cheapest_of_all(
    mesh: tuple[list[Replica], dict[str, float]], model_name: str | None
) -> None:
    replicas, cost = mesh
    chains = [
        stages for stages in all_chains(replicas) if model_name in (None, stages[0].model_name)
    ]
    served = {stages[0].model_name for stages in chains}
    if len(served) == 1:
        chain = choose_chain(replicas, model_name=model_name, costs=Priced(cost))
        assert chain.stages in chains
        prices = [price(stages, Priced(cost)) for stages in chains]
        assert price(chain.stages, Priced(cost)) == min(prices)
    elif served:
        with pytest.raises(InputError, match="m, n"):
            choose_chain(replicas, model_name=model_name, costs=Priced(cost))
    else:
        with pytest.raises((IncompleteError, InputError)):
            choose_chain(replicas, model_name=model_name, costs=Priced(cost))


@given(st.lists(st.tuples(ranges, st.booleans()), min_size=1, max_size=6))
def test_missing_layers_are_exactly_those_that_nobody_serves(
    served: list[tuple[tuple[int, int], bool]],
) -> None:
    replicas = [
        replica(f"p{i}", start, end, shard_loaded=loaded)
        for i, ((start, end), loaded) in enumerate(served)
    ]
    covered = {layer for (a, b), loaded in served if loaded for layer in range(a, b)}
    missing = missing_layers(replicas)
    assert {layer for a, b in missing for layer in range(a, b)} == set(range(N_LAYER)) - covered
    assert all(a < b for a, b in missing)
    assert all(left[1] < right[0] for left, right in itertools.pairwise(missing))


def test_the_layers_that_lack_are_named() -> None:
    replicas = [replica("a", 0, 1), replica("b", 2, 3), replica("c", 3, 5, shard_loaded=False)]
    with pytest.raises(IncompleteError, match=r"\[1, 2\), \[3, 5\) of m"):
        choose_chain(replicas)


def test_ranges_that_overlap_without_joining_are_said_to_do_so() -> None:
    with pytest.raises(IncompleteError, match="overlap"):
        choose_chain([replica("a", 0, 3), replica("b", 2, 5)])


def test_an_empty_mesh_and_an_unknown_model() -> None:
    with pytest.raises(IncompleteError) as empty:
        choose_chain([])
    assert empty.value.code == "EMPTY_MESH"
    with pytest.raises(InputError) as unknown:
        choose_chain([replica("a", 0, 5)], model_name="x")
    assert unknown.value.code == "UNKNOWN_MODEL"


def test_splits_are_never_mixed() -> None:
    with pytest.raises(IncompleteError):
        choose_chain([replica("a", 0, 2), replica("b", 2, 5, manifest_digest="e")])


def test_a_node_that_waits_for_its_shard_changes_nothing() -> None:
    waiting = replica("w", 0, 0, model_name="", manifest_digest="", n_layer=0, shard_loaded=False)
    assert choose_chain([waiting, replica("a", 0, 5)]).stages == (replica("a", 0, 5),)
    with pytest.raises(IncompleteError):
        choose_chain([waiting])


def test_a_model_that_only_overlaps_does_not_make_a_choice_necessary() -> None:
    replicas = [
        replica("a", 0, 5),
        replica("b", 0, 3, model_name="n"),
        replica("c", 2, 5, model_name="n"),
    ]
    assert choose_chain(replicas).stages == (replicas[0],)


def test_the_context_of_a_chain_is_its_smallest() -> None:
    assert choose_chain([replica("a", 0, 2, n_ctx=32), replica("b", 2, 5, n_ctx=48)]).n_ctx == 32


def test_a_node_that_is_named_takes_its_layers_and_one_that_is_avoided_none() -> None:
    replicas = [replica("ax", 0, 2), replica("bx", 0, 2), replica("cy", 2, 5), replica("dy", 2, 5)]
    assert [r.peer_id for r in pinned(replicas, via=["bx"])] == ["bx", "cy", "dy"]
    assert [r.peer_id for r in pinned(replicas, avoid=["a", "dy"])] == ["bx", "cy"]
    assert [r.peer_id for r in pinned(replicas, via=["a"], avoid=["cy"])] == ["ax", "dy"]


@pytest.mark.parametrize("name", ["x", "nobody"])
def test_a_name_must_be_that_of_one_node(name: str) -> None:
    with pytest.raises(InputError) as caught:
        pinned([replica("ax", 0, 2), replica("bx", 0, 2)], avoid=[name])
    assert caught.value.code == "UNKNOWN_PEER"
