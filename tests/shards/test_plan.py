"""Plans: every layer once, balanced, within memory."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import BUILT_IN, write_model

from shardmesh.errors import InputError
from shardmesh.shards.costs import ModelCosts, costs_of
from shardmesh.shards.gguf_check import read_gguf
from shardmesh.shards.layers import LayerRange, check_cover, ranges_of_counts
from shardmesh.shards.plan import memory_needed, plan_layers, plan_memory, plan_shards
from shardmesh.shards.split import plan_files, split_model

sizes = st.integers(1, 10**10)


@st.composite
def model_costs(draw: st.DrawFn, n_layer_max: int = 12) -> ModelCosts:
    layer_bytes = draw(st.lists(sizes, min_size=1, max_size=n_layer_max))
    n_layer = len(layer_bytes)
    return ModelCosts(
        layer_bytes=tuple(layer_bytes),
        kv_bytes=tuple(draw(st.lists(st.integers(0, 10**5), min_size=n_layer, max_size=n_layer))),
        every_bytes=draw(sizes),
        first_bytes=draw(sizes),
        last_bytes=draw(sizes),
        is_tied=False,
        n_embd=64,
        n_vocab=1000,
    )


def every_cut(n_layer: int, n_shards: int) -> list[tuple[LayerRange, ...]]:
    inner = itertools.combinations(range(1, n_layer), n_shards - 1)
    return [
        tuple(LayerRange(a, b) for a, b in itertools.pairwise((0, *ends, n_layer)))
        for ends in inner
    ]


def sizes_of(costs: ModelCosts, cut: tuple[LayerRange, ...]) -> list[int]:
    return [costs.file_bytes(layers) for layers in cut]


@settings(deadline=None)
@given(costs=model_costs(8), data=st.data())
def test_no_cut_is_smaller_at_its_largest_or_more_even(
    costs: ModelCosts, data: st.DataObject
) -> None:
    n_shards = data.draw(st.integers(1, costs.n_layer))
    plan = plan_shards(costs, n_shards)
    assert len(plan) == n_shards
    check_cover(plan, costs.n_layer)
    cuts = every_cut(costs.n_layer, n_shards)
    largest = min(max(sizes_of(costs, cut)) for cut in cuts)
    assert max(sizes_of(costs, plan)) == largest
    squares = min(
        sum(size**2 for size in sizes_of(costs, cut))
        for cut in cuts
        if max(sizes_of(costs, cut)) == largest
    )
    assert sum(size**2 for size in sizes_of(costs, plan)) == pytest.approx(squares, rel=1e-9)


@settings(deadline=None)
@given(costs=model_costs(7), data=st.data())
def test_memory_is_respected_and_refused_only_when_nothing_fits(
    costs: ModelCosts, data: st.DataObject
) -> None:
    n_machines = data.draw(st.integers(1, costs.n_layer))
    memory = data.draw(
        st.lists(st.integers(1, 4 * 10**10), min_size=n_machines, max_size=n_machines)
    )
    n_ctx = data.draw(st.integers(1, 100_000))

    def fits(cut: tuple[LayerRange, ...]) -> bool:
        needed = memory_needed(costs, cut, n_ctx)
        return all(n <= has for n, has in zip(needed, memory, strict=True))

    if any(fits(cut) for cut in every_cut(costs.n_layer, n_machines)):
        plan = plan_memory(costs, memory, n_ctx)
        check_cover(plan, costs.n_layer)
        assert fits(plan)
    else:
        with pytest.raises(InputError, match="does not fit"):
            plan_memory(costs, memory, n_ctx)


def even_costs(n_layer: int, layer_bytes: int = 2**30) -> ModelCosts:
    return ModelCosts(
        layer_bytes=(layer_bytes,) * n_layer,
        kv_bytes=(4096,) * n_layer,
        every_bytes=1,
        first_bytes=layer_bytes,
        last_bytes=layer_bytes,
        is_tied=False,
        n_embd=64,
        n_vocab=1000,
    )


def test_embedding_and_head_count() -> None:
    counts = [layers.n_layer for layers in plan_shards(even_costs(10), 3)]
    assert counts == [3, 4, 3]


def test_what_is_left_over_is_spread() -> None:
    counts = [layers.n_layer for layers in plan_shards(even_costs(22), 5)]
    assert max(counts) - min(counts) <= 2
    assert sorted(counts) == [3, 4, 5, 5, 5]


def test_larger_machines_get_more() -> None:
    gib = 2**30
    plan = plan_memory(even_costs(20), [8 * gib, 16 * gib, 32 * gib], n_ctx=4096)
    counts = [layers.n_layer for layers in plan]
    assert counts == sorted(counts)
    assert counts[2] > 2 * counts[0]


def test_a_model_that_does_not_fit_says_the_numbers() -> None:
    gib = 2**30
    with pytest.raises(InputError, match=r"with 4096 cached tokens .* machines have 12\.00 GiB"):
        plan_memory(even_costs(20), [6 * gib, 6 * gib], n_ctx=4096)
    with pytest.raises(InputError, match=r"machine 2 has 512\.00 MiB, but even one layer"):
        plan_memory(even_costs(20), [60 * gib, gib // 2, 60 * gib], n_ctx=4096)


def test_the_largest_plans_are_quick() -> None:
    plan = plan_shards(even_costs(512), 64)
    assert max(layers.n_layer for layers in plan) <= 9


@pytest.mark.parametrize("n_shards", [-1, 0, 5])
def test_impossible_numbers_of_shards_are_refused(n_shards: int) -> None:
    with pytest.raises(InputError, match="cannot be cut into"):
        plan_shards(even_costs(4), n_shards)


@pytest.mark.parametrize("counts", [(), (4,), (2, 4), (6, -1), (5, 0)])
def test_layer_lists_must_add_up(counts: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"the model has 5 layers|has a shard without layers"):
        plan_layers(5, counts)


def test_layer_lists_are_followed() -> None:
    assert plan_layers(5, (2, 1, 2)) == (LayerRange(0, 2), LayerRange(2, 3), LayerRange(3, 5))


@pytest.mark.parametrize(
    "ranges",
    [
        [LayerRange(0, 2)],
        [LayerRange(0, 2), LayerRange(3, 4)],
        [LayerRange(0, 3), LayerRange(2, 4)],
        [LayerRange(2, 4), LayerRange(0, 2)],
        [LayerRange(0, 5)],
        [],
    ],
)
def test_gaps_and_overlaps_are_refused(ranges: list[LayerRange]) -> None:
    with pytest.raises(InputError, match="layer"):
        check_cover(ranges, 4)


@pytest.mark.parametrize(("start", "end"), [(-1, 1), (2, 2), (3, 2)])
def test_empty_ranges_do_not_exist(start: int, end: int) -> None:
    with pytest.raises(InputError, match="not a range"):
        LayerRange(start, end)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("counts", [(4,), (1, 3), (1, 2, 1)])
def test_predicted_sizes_are_those_on_the_disk(
    tmp_path: Path, tied: bool, counts: tuple[int, ...]
) -> None:
    """To within what the headers of later stages take."""
    path = write_model(tmp_path / "m.gguf", vocabulary=BUILT_IN, tied=tied)
    model = read_gguf(path)
    costs, ranges = costs_of(model), ranges_of_counts(counts)
    manifest = split_model(path, ranges, tmp_path / "out", name="m")
    for shard in manifest.shards:
        assert shard.n_bytes == pytest.approx(costs.file_bytes(shard.layers), abs=8192)
    assert len(plan_files(model, ranges, "m")) == len(counts) + 1


def test_the_cache_of_a_layer_is_counted(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", "qwen3", vocabulary=BUILT_IN, n_embd=64)
    costs = costs_of(read_gguf(path))
    assert costs.kv_bytes == (2 * (32 + 32) * 2,) * 4  # heads, key and value, f16
