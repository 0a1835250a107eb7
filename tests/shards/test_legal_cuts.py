"""Where a model may be cut, and what its metadata becomes there; headers only."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmesh.errors import GgufError, InputError
from shardmesh.shards.architectures import RULES, rules_for
from shardmesh.shards.costs import ModelCosts
from shardmesh.shards.gguf_file import GgufFile
from shardmesh.shards.gguf_values import MetadataValue, bools, float32, string, uint32, uint32s
from shardmesh.shards.layers import LayerRange, ranges_of_counts
from shardmesh.shards.legal_cuts import check_legal, legal_boundaries, legal_cuts
from shardmesh.shards.plan import plan_layers, plan_memory, plan_shards
from shardmesh.shards.slice_metadata import cut_metadata


def header(architecture: str, n_layer: int, **values: MetadataValue) -> GgufFile:
    """A model without tensors; `__` in a key stands for a dot."""
    metadata = {
        "general.architecture": string(architecture),
        f"{architecture}.block_count": uint32(n_layer),
    }
    metadata |= {f"{architecture}.{k.replace('__', '.')}": v for k, v in values.items()}
    return GgufFile(Path("m.gguf"), 3, 32, metadata, (), 0)


def values_after_cut(model: GgufFile, start: int, end: int) -> dict[str, tuple[object, ...]]:
    metadata = cut_metadata(model, LayerRange(start, end))
    prefix = f"{model.architecture}."
    return {k.removeprefix(prefix): v.items() for k, v in metadata.items() if k.startswith(prefix)}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (header("llama", 4), (1, 2, 3)),
        (header("smollm3", 10), (4, 8)),
        (header("llama4", 24, interleave_moe_layer_step=uint32(3)), (12,)),
        (header("ernie4_5-moe", 6, interleave_moe_layer_step=uint32(2)), (2, 4)),
        # Each part needs a layer with a window: of 2 layers the first has one.
        (header("gpt-oss", 4), (1, 2)),
        (header("cohere2moe", 8), (2, 3, 4, 5, 6, 7)),  # the first layer sees all
        (header("gpt-oss", 4, attention__sliding_window_pattern=bools([1, 0, 0, 1])), (1, 2, 3)),
        (header("llama4", 11), (4,)),  # and four layers at least
        # Layers that look tokens up are in the first shard.
        (header("deepseek4", 6, hash_layer_count=uint32(3)), (3, 4, 5)),
        # A layer of each compression.
        (
            header("deepseek4", 8, attention__compress_ratios=uint32s([0, 0, *[4, 128] * 3])),
            (4, 5, 6),
        ),
        (
            header(
                "qwen4exp",
                8,
                ple__layers=uint32s([2]),
                attention__recurrent_layers=bools([1, 0] * 4),
            ),
            (3, 4, 5, 6),
        ),
        # Hybrids: a layer of each kind.
        (header("qwen35", 8), (4, 5, 6)),
        (header("qwen35", 6, full_attention_interval=uint32(2)), (2, 3, 4)),
        (header("jamba", 6, attention__head_count_kv=uint32s([0, 2, 0, 0, 0, 2])), (2, 3, 4)),
        (
            header(
                "nemotron_h",
                6,
                attention__head_count_kv=uint32s([0, 0, 2, 0, 0, 2]),
                feed_forward_length=uint32s([0, 9, 0, 9, 0, 0]),
            ),
            (3, 4),
        ),
        # A layer that shares what the one before chose stays with it.
        (header("glm-dsa", 5, attention__indexer__types=uint32s([1, 0, 1, 0, 0])), (2,)),
        # With 4 layers llama.cpp would take it for one without unrotated layers.
        (header("smallthinker", 16), (8,)),
        (header("deepseek2", 60), tuple(set(range(1, 60)) - {26, 27, 33, 34})),
        (header("deepseek2", 27), tuple(range(1, 27))),  # a lite model, and so are its shards
    ],
)
def test_legal_boundaries(model: GgufFile, expected: tuple[int, ...]) -> None:
    assert legal_boundaries(model) == tuple(sorted(expected))


def test_an_illegal_list_is_refused_with_the_nearest_legal_one() -> None:
    cuts = legal_cuts(header("smollm3", 12))
    check_legal(cuts, ranges_of_counts([4, 8]))
    with pytest.raises(InputError, match="steps of 4") as caught:
        check_legal(cuts, ranges_of_counts([5, 2, 5]))
    assert caught.value.next_step == "use --layers 4,4,4"
    with pytest.raises(InputError) as caught:
        check_legal(cuts, ranges_of_counts([3, 3, 3, 3]))
    assert caught.value.next_step == "use fewer shards than 4"


def costs(n_layer: int, model: GgufFile) -> ModelCosts:
    return ModelCosts(
        layer_bytes=(100,) * n_layer,
        kv_bytes=(0,) * n_layer,
        every_bytes=0,
        first_bytes=0,
        last_bytes=150,
        is_tied=False,
        n_embd=1,
        n_vocab=1,
        legal=legal_cuts(model),
    )


def test_shards_are_balanced_among_the_legal_cuts() -> None:
    n_layer = 20
    stepping = costs(n_layer, header("smollm3", n_layer))
    assert plan_shards(stepping, 2) == ranges_of_counts([12, 8])
    assert plan_shards(stepping, 5) == ranges_of_counts([4] * 5)
    assert plan_shards(costs(n_layer, header("llama", n_layer)), 2) == ranges_of_counts([11, 9])
    with pytest.raises(InputError, match="cannot be cut into 6 shards"):
        plan_shards(stepping, 6)


def test_memory_is_filled_among_the_legal_cuts() -> None:
    stepping = costs(20, header("smollm3", 20))
    fixed = stepping.memory_bytes(LayerRange(0, 4), 1) - 400
    assert plan_memory(stepping, [fixed + 900, fixed + 1600], 1) == ranges_of_counts([8, 12])
    with pytest.raises(InputError, match="does not fit"):  # 11 and 9 would
        plan_memory(stepping, [fixed + 1100, fixed + 1100], 1)


def test_periods_become_lists() -> None:
    cut = values_after_cut(header("gemma3", 12), 4, 9)
    assert cut["attention.sliding_window_pattern"] == (True, False, True, True, True)
    by_key = header("gemma3", 6, attention__sliding_window_pattern=uint32(3))
    cut = values_after_cut(by_key, 1, 6)
    assert cut["attention.sliding_window_pattern"] == (True, False, True, True, False)
    cut = values_after_cut(header("qwen3next", 8), 2, 8)
    assert cut["attention.recurrent_layers"] == (True, False, True, True, True, False)


def test_leading_layers_are_counted_from_the_range() -> None:
    model = header("deepseek", 6, leading_dense_block_count=uint32(3), n_deepstack_layers=uint32(1))
    assert [
        (
            values_after_cut(model, start, 6)["leading_dense_block_count"],
            values_after_cut(model, start, 6)["n_deepstack_layers"],
        )
        for start in (0, 1, 2, 3, 5)
    ] == [((3,), (1,)), ((2,), (0,)), ((1,), (0,)), ((0,), (0,)), ((0,), (0,))]


def test_the_scale_of_the_input_is_for_the_first_shard() -> None:
    model = header("granite", 4, embedding_scale=float32(12.0))
    assert values_after_cut(model, 0, 2)["embedding_scale"] == (12.0,)
    assert values_after_cut(model, 2, 4)["embedding_scale"] == (0.0,)


def test_a_shard_that_begins_with_a_recurrent_layer_has_heads() -> None:
    heads = uint32s([8, 0, 0, 8])
    model = header("lfm2", 4, attention__head_count=heads, attention__head_count_kv=heads)
    cut = values_after_cut(model, 1, 4)
    assert cut["attention.head_count"] == (8, 0, 8)
    assert cut["attention.head_count_kv"] == (0, 0, 8)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (header("talkie", 4), "adds the model's own input again"),
        (header("ernie4_5-moe", 4, nextn_predict_layers=uint32(1)), "multi-token prediction"),
        (header("glm4moe", 4, nextn_predict_layers=uint32(5)), "has -1 layers"),
        (header("nanbeige", 4, num_loops=uint32(2)), "uses nanbeige.num_loops"),
        (header("llama4", 8, attention__sliding_window=uint32(0)), "switched off"),
        (header("exaone4", 64), "64 layers: llama.cpp switches its sliding windows on"),
        (header("command-r", 64), "norms queries and keys only"),
        (header("bert", 12), "from both ends"),
        (header("t5", 12), "encoder"),
        (header("lfm2", 2, attention__head_count=uint32s([0, 8])), "heads in its first layer"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_its_reason(model: GgufFile, sentence: str) -> None:
    with pytest.raises(GgufError, match=sentence) as caught:
        rules_for(model)
    assert caught.value.code in ("GGUF_ARCHITECTURE", "GGUF_VALUE")


def test_an_unknown_architecture_gets_the_general_rules_and_no_roll_back() -> None:
    rules = rules_for(header("unheard-of", 4))
    assert (rules.is_unknown, rules.needs_head, rules.rolls_back) == (True, False, False)


def test_layers_for_multi_token_prediction_are_left_out() -> None:
    heads = uint32s([8, 8, 8, 4])
    model = header("glm4moe", 4, nextn_predict_layers=uint32(1), attention__head_count_kv=heads)
    assert model.n_layer == 3
    cut = values_after_cut(model, 1, 3)
    assert cut["block_count"] == (2,)
    assert cut["attention.head_count_kv"] == (8, 8)
    assert "nextn_predict_layers" not in cut


def test_what_follows_from_the_number_of_layers_is_written_out() -> None:
    cut = values_after_cut(header("minicpm", 40), 10, 20)
    assert cut["residual_scale"] == (pytest.approx(1.4 / 40**0.5, rel=1e-6),)
    own = header("minicpm", 40, residual_scale=float32(0.5))
    assert values_after_cut(own, 10, 20)["residual_scale"] == (0.5,)
    lite = header("deepseek2", 27, attention__q_lora_rank=uint32(7))
    assert values_after_cut(lite, 5, 9)["attention.q_lora_rank"] == (0,)
    full = header("deepseek2", 61, attention__q_lora_rank=uint32(7))
    assert values_after_cut(full, 5, 9)["attention.q_lora_rank"] == (7,)


@pytest.mark.parametrize(
    ("n_layer", "n_vocab", "given", "expected"),
    [(47, 154880, 0, 2), (47, 1000, 0, 1), (60, 154880, 0, 1), (47, 154880, 1, 1)],
)
def test_the_gate_of_the_experts_is_that_of_the_whole(
    n_layer: int, n_vocab: int, given: int, expected: int
) -> None:
    model = header(
        "deepseek2", n_layer, vocab_size=uint32(n_vocab), expert_gating_func=uint32(given)
    )
    assert values_after_cut(model, 0, 9)["expert_gating_func"] == (expected,)


@given(
    architecture=st.sampled_from(["llama", "smollm3", "gpt-oss", "qwen35", "deepseek2", "gemma3"]),
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=5),
)
def test_a_proposed_list_is_always_legal(architecture: str, counts: list[int]) -> None:
    model = header(architecture, sum(counts))
    cuts, wanted = legal_cuts(model), ranges_of_counts(counts)
    try:
        check_legal(cuts, wanted)
    except InputError as error:
        listed = re.fullmatch(r"use --layers ([0-9,]+)", error.next_step)
        if listed is not None:
            proposed = plan_layers(sum(counts), [int(n) for n in listed[1].split(",")])
            check_legal(cuts, proposed)
            assert len(proposed) == len(counts)


@given(
    architecture=st.sampled_from(["smollm3", "gpt-oss", "qwen35", "deepseek2", "llama4"]),
    n_layer=st.integers(1, 40),
    n_shards=st.integers(1, 8),
)
def test_a_balance_is_always_legal_and_no_legal_list_is_better(
    architecture: str, n_layer: int, n_shards: int
) -> None:
    model = header(architecture, n_layer)
    even = costs(n_layer, model)
    try:
        ranges = plan_shards(even, n_shards)
    except InputError:
        cuts = legal_cuts(model)
        assert n_shards > n_layer or cuts.nearest(_any_ranges(n_layer, n_shards)) is None
        return
    check_legal(legal_cuts(model), ranges)
    other = legal_cuts(model).nearest(_any_ranges(n_layer, n_shards))
    assert other is not None
    largest = max(even.file_bytes(layers) for layers in ranges)
    assert largest <= max(even.file_bytes(layers) for layers in other)


def _any_ranges(n_layer: int, n_shards: int) -> tuple[LayerRange, ...]:
    """About even."""
    return ranges_of_counts(
        [n_layer // n_shards] * (n_shards - 1) + [n_layer - n_layer // n_shards * (n_shards - 1)]
    )


def test_a_rule_with_a_refusal_has_no_other_rule() -> None:
    for rules in RULES.values():
        assert not (rules.refusal and (rules.input_node or rules.window or rules.needs_head))


def test_what_only_the_first_shard_looks_up_is_not_in_the_others() -> None:
    model = header(
        "qwen4exp", 4, ple__layers=uint32s([0]), ple__head_offsets=uint32s([0, 9, 18, 27])
    )
    first, later = values_after_cut(model, 0, 2), values_after_cut(model, 2, 4)
    assert first["ple.head_offsets"] == (0, 9, 18, 27)  # as many as layers, and none of theirs
    assert first["ple.layers"] == (0,)
    assert not [key for key in later if key.startswith("ple.")]
