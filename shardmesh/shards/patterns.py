"""Layers of different kinds in one model: which see a window, which are recurrent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from shardmesh.shards.architectures import rules_for
from shardmesh.shards.gguf_file import GgufFile

WINDOW_PATTERN_KEY: Final = "attention.sliding_window_pattern"
RECURRENT_KEY: Final = "attention.recurrent_layers"
_INDEXER_KEY: Final = "attention.indexer.types"
_COMPRESS_KEY: Final = "attention.compress_ratios"
_INTERVAL_KEY: Final = "full_attention_interval"


def windowed_layers(model: GgufFile) -> tuple[bool, ...]:
    """For each layer whether it sees only a window; empty if nothing says so.

    A file has a list, or a period, or nothing: then it is the architecture's own period.
    """
    key = f"{model.architecture}.{WINDOW_PATTERN_KEY}"
    value = model.metadata.get(key)
    if value is not None and value.is_array:
        return tuple(bool(item) for item in value.items()[: model.n_layer])
    pattern = rules_for(model).window
    if pattern is None:
        return ()
    period = model.get_int(key, pattern.period)
    if period == 0:  # as llama.cpp has it: every layer
        return (True,) * model.n_layer
    full = 0 if pattern.full_first else period - 1
    return tuple(layer % period != full for layer in range(model.n_layer))


def recurrent_layers(model: GgufFile) -> tuple[bool, ...]:
    """For each layer of a hybrid whether it is recurrent.

    A file has a list, or layers without key-value heads, or an interval of attention layers.
    """
    prefix = model.architecture
    value = model.metadata.get(f"{prefix}.{RECURRENT_KEY}")
    if value is not None and value.is_array:
        return tuple(bool(item) for item in value.items()[: model.n_layer])
    heads = model.metadata.get(f"{prefix}.attention.head_count_kv")
    if heads is not None and heads.is_array:
        alone = layers_with_nothing_else(model)
        return tuple(not n_heads and alone[i] for i, n_heads in enumerate(_heads(model)))
    interval = max(1, model.get_int(f"{prefix}.{_INTERVAL_KEY}", rules_for(model).interval_default))
    return tuple((layer + 1) % interval != 0 for layer in range(model.n_layer))


def attention_layers(model: GgufFile) -> tuple[bool, ...]:
    """For each layer of a hybrid whether it has attention."""
    alone = layers_with_nothing_else(model)
    return tuple(
        not is_recurrent and alone[i] for i, is_recurrent in enumerate(recurrent_layers(model))
    )


def layers_with_nothing_else(model: GgufFile) -> tuple[bool, ...]:
    """False for the layers that are a feed-forward part only."""
    if not rules_for(model).one_part_a_layer:
        return (True,) * model.n_layer
    n_ff = model.get_per_layer(f"{model.architecture}.feed_forward_length", model.n_layer, 0)
    return tuple(n == 0 for n in n_ff)


def _heads(model: GgufFile) -> tuple[int, ...]:
    return model.get_per_layer(f"{model.architecture}.attention.head_count_kv", model.n_layer, 1)


def token_layers(model: GgufFile) -> tuple[bool, ...]:
    """For each layer whether it looks tokens up; empty if none can."""
    key = rules_for(model).tokens_key
    if not key:
        return ()
    value = model.metadata.get(f"{model.architecture}.{key}")
    if value is not None and value.is_array:
        listed = {int(item) for item in value.items()}
        return tuple(layer in listed for layer in range(model.n_layer))
    n_first = model.get_int(f"{model.architecture}.{key}", 0)
    return tuple(layer < n_first for layer in range(model.n_layer))


def compressed_layers(model: GgufFile) -> Iterator[tuple[bool, ...]]:
    """For each compression of the model, for each layer whether it compresses so."""
    key = f"{model.architecture}.{_COMPRESS_KEY}"
    ratios = model.get_per_layer(key, model.n_layer, 0)
    for ratio in sorted(set(ratios) - {0}):
        yield tuple(each == ratio for each in ratios)


def own_indexers(model: GgufFile) -> tuple[bool, ...]:
    """For each layer whether it chooses itself what it attends to; empty if nothing says so.

    The others share the choice of a layer before them, which must be in the same shard.
    """
    value = model.metadata.get(f"{model.architecture}.{_INDEXER_KEY}")
    if value is None or not value.is_array:
        return ()
    return tuple(bool(item) for item in value.items()[: model.n_layer])
