"""Which shard a node serves, by flags and manifest."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmesh.errors import InputError
from shardmesh.listener.assignment import WantedShard, assign, least_served
from shardmesh.shards.manifest import Manifest, ShardEntry, TokenizerEntry

MANIFEST = Manifest(
    schema_version=1,
    model_name="m",
    architecture="llama",
    n_layer=5,
    n_embd=64,
    n_ctx_train=512,
    can_roll_back=True,
    adapters=(),
    quantization="f16",
    slicer_version="1",
    shards=tuple(
        ShardEntry(shard_id=i, layer_start=a, layer_end=b, n_bytes=1, sha256="0" * 64)
        for i, (a, b) in enumerate([(0, 2), (2, 5)])
    ),
    tokenizer=TokenizerEntry(n_bytes=1, sha256="0" * 64),
)


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
