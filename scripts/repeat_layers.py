"""A longer model out of a short one: all its layers, several times over.

For architectures whose fixture has no legal cut at any number of layers, since llama.cpp's program
writes the layers that each shard needs only once.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from shardmesh.shards.architectures import ARRAYS_NOT_PER_LAYER
from shardmesh.shards.gguf_check import ALIGNMENT_KEY, read_gguf
from shardmesh.shards.gguf_file import GgufFile
from shardmesh.shards.gguf_values import MetadataValue, uint32
from shardmesh.shards.gguf_write import write_contents
from shardmesh.shards.slices import FileContents, ShardTensor, copied

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


def write_repeated(source: Path, target: Path, n_times: int) -> Path:
    """Writes `source` with all its layers `n_times` over to `target`, and returns that."""
    model = read_gguf(source)
    contents = FileContents(_metadata(model, n_times), _tensors(model, n_times))
    with target.open("wb") as file:
        write_contents(file, contents)
    return target


def _metadata(model: GgufFile, n_times: int) -> dict[str, MetadataValue]:
    prefix = f"{model.architecture}."
    metadata = {
        key: _repeated(value, n_times)
        if value.is_array
        and value.n_items == model.n_layer
        and key.startswith(prefix)
        and key.removeprefix(prefix) not in ARRAYS_NOT_PER_LAYER
        else value
        for key, value in model.metadata.items()
        if key != ALIGNMENT_KEY
    }
    return metadata | {f"{prefix}block_count": uint32(n_times * model.n_layer)}


def _repeated(value: MetadataValue, n_times: int) -> MetadataValue:
    return dataclasses.replace(
        value, payload=value.payload * n_times, n_items=value.n_items * n_times
    )


def _tensors(model: GgufFile, n_times: int) -> tuple[ShardTensor, ...]:
    tensors = []
    for tensor in model.tensors:
        block = _BLOCK.fullmatch(tensor.name)
        if block is None:
            tensors.append(copied(tensor, tensor.name))
            continue
        for number in range(n_times):
            layer = number * model.n_layer + int(block[1])
            tensors.append(copied(tensor, f"blk.{layer}.{block[2]}"))
    return tuple(tensors)
