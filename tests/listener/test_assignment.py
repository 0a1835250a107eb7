"""Which shard a node serves, by flags and manifest."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.manifests import a_manifest

from shardmesh.errors import InputError
from shardmesh.listener.assignment import (
    MOVE_GAIN_MIN,
    Serving,
    WantedShard,
    assign,
    better_shard,
    least_served,
    staying,
)
from shardmesh.shards.manifest import Manifest

MANIFEST = a_manifest((2, 3), model_name="m")


def test_the_manifest_says_it_all() -> None:
    found = assign(WantedShard(), 1, MANIFEST)
    assert (found.layer_start, found.layer_end, found.total_layers) == (2, 5, 5)
    assert (found.total_shards, found.model_name) == (2, "m")
    assert found.manifest_digest == MANIFEST.digest()


def test_flags_that_agree_with_the_manifest_change_nothing() -> None:
    wanted = WantedShard(shard_id=1, total_shards=2, total_layers=5, model_name="m")
    assert assign(wanted, 1, MANIFEST) == assign(WantedShard(), 1, MANIFEST)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (WantedShard(total_shards=4), "--total-shards says 4, the manifest says 2"),
        (WantedShard(total_layers=6), "--total-layers says 6, the manifest says 5"),
        (WantedShard(model_name="n"), "--model-name says n, the manifest says m"),
    ],
)
def test_a_contradiction_is_named_with_both_values(wanted: WantedShard, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        assign(wanted, 0, MANIFEST)


@pytest.mark.parametrize("shard_id", [-1, 2])
@pytest.mark.parametrize("manifest", [MANIFEST, None])
def test_a_shard_that_does_not_exist(shard_id: int, manifest: Manifest | None) -> None:
    with pytest.raises(InputError) as caught:
        assign(WantedShard(total_shards=2), shard_id, manifest)
    assert caught.value.code == "NO_SUCH_SHARD"


def test_without_a_manifest_a_node_joins_with_what_the_flags_say() -> None:
    found = assign(WantedShard(total_shards=4, total_layers=8, model_name="x"), 3, None)
    assert (found.total_shards, found.total_layers, found.model_name) == (4, 8, "x")
    assert (found.layer_start, found.layer_end, found.manifest_digest) == (0, 0, "")
    assert assign(WantedShard(), 3, None).total_shards == 4


@given(st.integers(1, 6), st.lists(st.integers(0, 8), max_size=12), st.sets(st.integers(0, 5)))
def test_the_shard_with_the_fewest_replicas_is_taken(
    total_shards: int, served: list[int], here: set[int]
) -> None:
    chosen = least_served(total_shards, served, here)
    n_replicas = Counter(served)
    fewest = min(n_replicas[i] for i in range(total_shards))
    candidates = [i for i in range(total_shards) if n_replicas[i] == fewest]
    assert chosen == min([i for i in candidates if i in here] or candidates)


def test_nobody_says_how_many_shards_there_are() -> None:
    with pytest.raises(InputError) as caught:
        least_served(0, [])
    assert caught.value.code == "NO_SHARD_ID"


# -- moving ------------------------------------------------------------------------------------

N_SHARDS = 4


def _serving(peer_id: str, shard_id: int, **known: object) -> Serving:
    fields = {"n_parallel": 4, "is_loaded": True, "is_draining": False, **known}
    return Serving(peer_id=peer_id, shard_id=shard_id, **fields)  # type: ignore[arg-type]


@st.composite
def _meshes(draw: st.DrawFn) -> list[Serving]:
    return [
        _serving(
            f"node-{number}",
            draw(st.integers(0, N_SHARDS - 1)),
            n_parallel=draw(st.sampled_from([0, 1, 4, 4, 16])),
            is_loaded=draw(st.sampled_from([True, True, True, False])),
            is_draining=draw(st.sampled_from([False, False, False, True])),
        )
        for number in range(draw(st.integers(1, 10)))
    ]


def _carried(mesh: list[Serving], shard_id: int) -> int:
    return sum(s.strength for s in mesh if s.shard_id == shard_id and not s.is_draining)


@given(_meshes())
def test_who_moves_leaves_somebody_behind_and_helps_clearly(mesh: list[Serving]) -> None:
    own, *others = mesh
    target = better_shard(own, others, N_SHARDS)
    if target is None:
        return
    moved = [*others, dataclasses.replace(own, shard_id=target)]
    left = [s for s in others if s.shard_id == own.shard_id and s.is_loaded and not s.is_draining]
    assert target != own.shard_id
    assert left
    before = _carried(mesh, target)
    after = min(sum(s.strength for s in left), _carried(moved, target))
    assert after > before * (1 + MOVE_GAIN_MIN)
    assert before == min(_carried(mesh, i) for i in range(N_SHARDS) if i != own.shard_id)


@given(_meshes())
def test_moves_one_after_the_other_come_to_an_end(mesh: list[Serving]) -> None:
    """Nobody goes to and fro, and no shard that was served is without a replica at any time."""
    mesh = [dataclasses.replace(s, is_loaded=True, is_draining=False) for s in mesh]
    for _ in range(10 * len(mesh)):
        served = {s.shard_id for s in mesh}
        moves = [
            (number, target)
            for number, own in enumerate(mesh)
            if (target := better_shard(own, mesh[:number] + mesh[number + 1 :], N_SHARDS))
            is not None
        ]
        if not moves:
            return
        number, target = moves[0]
        mesh[number] = dataclasses.replace(mesh[number], shard_id=target)
        assert served <= {s.shard_id for s in mesh}
    pytest.fail(f"still moving: {mesh}")


def test_a_spare_replica_takes_the_place_of_a_dead_one() -> None:
    spare, other = _serving("a", 0), _serving("b", 0)
    assert better_shard(spare, [other, _serving("c", 1)], 3) == 2
    assert better_shard(spare, [other, _serving("c", 1), _serving("d", 2)], 3) is None


def test_one_that_still_loads_counts_where_it_goes_and_not_where_it_is() -> None:
    spare, other = _serving("a", 0), _serving("b", 0)
    assert better_shard(spare, [other, _serving("c", 1, is_loaded=False)], 2) is None
    assert better_shard(spare, [_serving("b", 0, is_loaded=False)], 2) is None


def test_while_one_leaves_nobody_else_does() -> None:
    others = [_serving("b", 0), _serving("c", 0, is_draining=True)]
    assert better_shard(_serving("a", 0), others, 2) is None
    assert staying(_serving("a", 0), others) == others[:1]


def test_a_shard_that_could_not_be_had_is_left_out() -> None:
    assert better_shard(_serving("a", 0), [_serving("b", 0)], 3, not_to={1}) == 2
    assert better_shard(_serving("a", 0), [_serving("b", 0)], 2, not_to={1}) is None


def test_of_two_that_want_to_leave_the_one_with_the_lower_peer_id_goes() -> None:
    a, b = (_serving(peer_id, 0, wants_to_leave=True) for peer_id in "ab")
    assert better_shard(a, [b], 2) == 1
    assert better_shard(b, [a], 2) is None
    assert better_shard(_serving("0", 0), [a], 2) is None  # it would only have to take it back
