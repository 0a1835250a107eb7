"""What each part of a model costs: bytes in a file and bytes of memory."""

from __future__ import annotations

import dataclasses
import itertools
from functools import cached_property
from typing import Final

from shardmesh.shards.gguf_file import GgufFile
from shardmesh.shards.gguf_write import n_bytes_of, padded
from shardmesh.shards.layers import LayerRange
from shardmesh.shards.legal_cuts import ANYWHERE, LegalCuts, legal_cuts
from shardmesh.shards.slices import sort_tensors, tokenizer_contents, zero_table

MICRO_BATCH_TOKENS: Final = 512
"""Tokens for which llama.cpp lays out its buffers (its default n_ubatch)."""

PROCESS_BYTES: Final = 256 * 1024 * 1024
"""What the two processes of a listener take without any model."""

_CACHE_VALUE_BYTES: Final = 2  # f16
_BUFFERS_PER_TOKEN: Final = 16  # vectors of n_embd alive at once inside a layer, with room
_F32_BYTES: Final = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCosts:
    """Bytes of a model's parts; the KV cache is counted in f16."""

    layer_bytes: tuple[int, ...]
    kv_bytes: tuple[int, ...]  # of each layer, for one token
    every_bytes: int  # in each shard
    first_bytes: int  # embedding and vocabulary
    last_bytes: int  # output head
    is_tied: bool  # the head is the embedding: in one shard it is there once
    n_embd: int
    n_vocab: int
    legal: LegalCuts = ANYWHERE

    @property
    def n_layer(self) -> int:
        return len(self.layer_bytes)

    def file_bytes(self, layers: LayerRange) -> int:
        """Weights and vocabulary of a shard."""
        before = self._layer_bytes_before
        n_bytes = self.every_bytes + before[layers.layer_end] - before[layers.layer_start]
        is_first, is_last = layers.layer_start == 0, layers.layer_end == self.n_layer
        if is_first:
            n_bytes += self.first_bytes
        if is_last and not (is_first and self.is_tied):
            n_bytes += self.last_bytes
        return n_bytes

    def memory_bytes(self, layers: LayerRange, n_ctx: int) -> int:
        """Memory of a listener with this shard and `n_ctx` cached tokens in all; an estimate."""
        before = self._kv_bytes_before
        cache = n_ctx * (before[layers.layer_end] - before[layers.layer_start])
        has_logits = layers.layer_start == 0 or layers.layer_end == self.n_layer
        width = _BUFFERS_PER_TOKEN * self.n_embd + (self.n_vocab if has_logits else 0)
        buffers = MICRO_BATCH_TOKENS * width * _F32_BYTES
        return self.file_bytes(layers) + cache + buffers + PROCESS_BYTES

    @cached_property
    def _layer_bytes_before(self) -> tuple[int, ...]:
        return tuple(itertools.accumulate(self.layer_bytes, initial=0))

    @cached_property
    def _kv_bytes_before(self) -> tuple[int, ...]:
        return tuple(itertools.accumulate(self.kv_bytes, initial=0))


def costs_of(model: GgufFile) -> ModelCosts:
    """The costs of a model's parts; raises GgufError (theirs) if it cannot be cut."""
    tensors = sort_tensors(model)
    embedding, head = tensors.embedding, tensors.head
    unused = padded(zero_table(embedding, "").n_bytes) if tensors.needs_head else 0
    return ModelCosts(
        layer_bytes=tuple(
            sum(padded(tensor.n_bytes) for _, tensor in layer) for layer in tensors.layers
        ),
        kv_bytes=_kv_bytes(model),
        every_bytes=sum(padded(tensor.n_bytes) for tensor in tensors.shared),
        first_bytes=unused
        + sum(padded(tensor.n_bytes) for tensor in (embedding, *tensors.of_first))
        + n_bytes_of(tokenizer_contents(model)),
        last_bytes=unused + padded((head or embedding).n_bytes),
        is_tied=head is None,
        n_embd=embedding.shape[0],
        n_vocab=embedding.shape[1],
        legal=legal_cuts(model),
    )


def _kv_bytes(model: GgufFile) -> tuple[int, ...]:
    """Bytes that each layer caches for one token."""
    prefix = f"{model.architecture}.attention"
    n_head = model.get_per_layer(f"{prefix}.head_count", model.n_layer, 0)
    n_head_kv = model.get_per_layer(f"{prefix}.head_count_kv", model.n_layer, max(n_head))
    n_embd = model.get_int(f"{model.architecture}.embedding_length")
    n_embd_head = n_embd // max(1, *n_head)
    row = model.get_int(f"{prefix}.key_length", n_embd_head)
    row += model.get_int(f"{prefix}.value_length", n_embd_head)
    return tuple(heads * row * _CACHE_VALUE_BYTES for heads in n_head_kv)
