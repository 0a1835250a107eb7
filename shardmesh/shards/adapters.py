"""LoRA adapters: what an adapter file consists of for each shard of a model.

An adapter has two tensors for each weight that it changes, named after it with `.lora_a` and
`.lora_b`.  They go with the weight: renumbered as its block is, or to the stage that has the
embedding or the head.  Format: `llama_adapter_lora_init` of llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from shardmesh.errors import GgufError
from shardmesh.shards.gguf_file import GgufFile, Tensor
from shardmesh.shards.gguf_values import string
from shardmesh.shards.layers import LayerRange
from shardmesh.shards.slices import (
    EMBEDDING,
    HEAD,
    FileContents,
    ShardTensor,
    copied,
    shard_architecture,
    sort_tensors,
)

_PAIR: Final = re.compile(r"(?P<weight>.+)\.lora_[ab]")
_BLOCK: Final = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\.(.+)")
_IGNORED: Final = "_norm.weight"  # llama.cpp leaves these out, too
_ACTIVATED: Final = "adapter.alora.invocation_tokens"


def adapter_contents(
    adapter: GgufFile, model: GgufFile, ranges: Sequence[LayerRange]
) -> list[FileContents | None]:
    """What the adapter's file for each shard consists of; None where it changes nothing.

    Raises GgufError (theirs) for a file that is no LoRA adapter, or not one of this model.
    """
    _check_kind(adapter, model)
    metadata = {
        key: value
        for key, value in adapter.metadata.items()
        if key.startswith(("general.", "adapter.")) and key != "general.alignment"
    }
    weights = _weights(adapter, model)
    architecture = model.architecture if len(ranges) == 1 else shard_architecture(model)
    metadata["general.architecture"] = string(architecture)
    parts = [tuple(_part(adapter, weights, layers, model.n_layer)) for layers in ranges]
    if not any(parts):
        raise _unsuitable(adapter, "changes nothing in this model")
    return [FileContents(metadata, tensors) if tensors else None for tensors in parts]


def _check_kind(adapter: GgufFile, model: GgufFile) -> None:
    kind = adapter.get_text("general.type", ""), adapter.get_text("adapter.type", "")
    if kind != ("adapter", "lora"):
        raise _unsuitable(adapter, "is not a LoRA adapter")
    if adapter.architecture != model.architecture:
        raise _unsuitable(adapter, f"is for {adapter.architecture[:64]}, not {model.architecture}")
    if _ACTIVATED in adapter.metadata:
        raise _unsuitable(adapter, "works only behind certain tokens, which is not supported")


def _weights(adapter: GgufFile, model: GgufFile) -> dict[str, str]:
    """Tensor name -> the weight of the model that it changes."""
    known = {tensor.name for tensor in model.tensors}
    weights = {}
    for tensor in adapter.tensors:
        pair = _PAIR.fullmatch(tensor.name)
        if pair is None:
            if not tensor.name.endswith(_IGNORED):
                raise _unsuitable(adapter, f"has tensor {tensor.name}, which is none of a LoRA")
        elif pair["weight"] not in known:
            raise _unsuitable(adapter, f"changes {pair['weight']}, which the model does not have")
        else:
            weights[tensor.name] = pair["weight"]
    _check_ends(adapter, model, set(weights.values()))
    return weights


def _check_ends(adapter: GgufFile, model: GgufFile, changed: set[str]) -> None:
    """Refuses what would be another weight in a shard than in the model."""
    tensors = sort_tensors(model)
    if EMBEDDING in changed and tensors.head is None:
        raise _unsuitable(adapter, "changes an embedding that is the output head as well")
    if HEAD in changed and not tensors.needs_head:
        raise _unsuitable(adapter, "changes the output head, which shards of this model rename")


def _part(
    adapter: GgufFile, weights: dict[str, str], layers: LayerRange, n_layer: int
) -> Iterator[ShardTensor]:
    for tensor in adapter.tensors:
        if tensor.name in weights and (name := _name_in(tensor, layers, n_layer)):
            yield copied(tensor, name)


def _name_in(tensor: Tensor, layers: LayerRange, n_layer: int) -> str:
    """The tensor's name in the file for these layers; empty if it has no place there."""
    block = _BLOCK.fullmatch(tensor.name)
    if block is not None:
        layer = int(block[1])
        return f"blk.{layer - layers.layer_start}.{block[2]}" if layer in layers else ""
    at_end = layers.layer_end == n_layer
    has_place = at_end if tensor.name.startswith(HEAD) else layers.layer_start == 0
    return tensor.name if has_place else ""


def _unsuitable(adapter: GgufFile, what: str) -> GgufError:
    return GgufError(
        f"{adapter.path} {what[:300]}",
        code="BAD_ADAPTER",
        next_step="give a LoRA adapter in GGUF format that was made for this very model",
    )
