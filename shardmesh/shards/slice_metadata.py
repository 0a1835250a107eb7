"""The metadata of a range of layers: what is told per layer is cut, what is counted, recounted.

llama.cpp counts layers from the first one of a file; whatever it derives from such a number must
come out for each layer as it does in the whole model.
"""

from __future__ import annotations

from typing import Final

from shardmesh.shards.architectures import ARRAYS_NOT_PER_LAYER, rules_for
from shardmesh.shards.gguf_check import ALIGNMENT_KEY
from shardmesh.shards.gguf_file import GgufFile
from shardmesh.shards.gguf_values import MetadataValue, bools, float32, uint32, uint32s
from shardmesh.shards.layer_counts import written_out
from shardmesh.shards.layers import LayerRange
from shardmesh.shards.patterns import (
    RECURRENT_KEY,
    WINDOW_PATTERN_KEY,
    recurrent_layers,
    windowed_layers,
)

NEXTN_KEY: Final = "nextn_predict_layers"
HEADS_KEY: Final = "attention.head_count"
LEADING_KEYS: Final = ("leading_dense_block_count", "n_deepstack_layers", "hash_layer_count")
"""So many of the first layers are special."""


def cut_metadata(model: GgufFile, layers: LayerRange) -> dict[str, MetadataValue]:
    """The metadata that the blocks of a range need; no chat template."""
    prefix = f"{model.architecture}."
    metadata = {}
    for key, value in model.metadata.items():
        if key == ALIGNMENT_KEY or key.startswith(("tokenizer.chat_template", "shardmesh.")):
            continue
        is_per_layer = (
            value.is_array
            and value.n_items in (model.n_layer, model.n_layer + model.n_nextn)
            and key.startswith(prefix)
            and key.removeprefix(prefix) not in ARRAYS_NOT_PER_LAYER
        )
        metadata[key] = value.cut(layers.layer_start, layers.layer_end) if is_per_layer else value
    metadata[f"{prefix}block_count"] = uint32(layers.n_layer)
    metadata.pop(f"{prefix}{NEXTN_KEY}", None)
    metadata |= written_out(model)
    for name in LEADING_KEYS:
        if prefix + name in metadata:
            n_leading = model.get_int(prefix + name) - layers.layer_start
            metadata[prefix + name] = uint32(max(0, n_leading))
    if layers.layer_start:
        rules = rules_for(model)
        for name in rules.keys_set_to_zero:
            metadata[prefix + name] = float32(0.0)
        if rules.keys_of_first:
            of_first = prefix + rules.keys_of_first
            metadata = {k: v for k, v in metadata.items() if not k.startswith(of_first)}
    heads = metadata.get(prefix + HEADS_KEY)
    if heads is not None and heads.is_array and not heads.items()[0]:
        # llama.cpp takes the width of a head from the first layer, recurrent or not.
        metadata[prefix + HEADS_KEY] = _with_first_head(heads)
    return metadata | _kinds_of_layers(model, layers)


def _with_first_head(heads: MetadataValue) -> MetadataValue:
    """The number of heads of the layers that have any is given to the first one too."""
    counts = [int(item) for item in heads.items()]
    return uint32s([max(counts), *counts[1:]])


def _kinds_of_layers(model: GgufFile, layers: LayerRange) -> dict[str, MetadataValue]:
    """Lists in the place of periods."""
    rules = rules_for(model)
    lists = {}
    if rules.window is not None:
        lists[WINDOW_PATTERN_KEY] = windowed_layers(model)
    if rules.writes_recurrent:
        lists[RECURRENT_KEY] = recurrent_layers(model)
    return {
        f"{model.architecture}.{key}": bools(kinds[layers.layer_start : layers.layer_end])
        for key, kinds in lists.items()
    }
