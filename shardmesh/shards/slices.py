"""What each shard file contains: pure decisions over a model's header.

A shard is a whole, smaller model.  The first stage keeps vocabulary and embedding.  Later stages
take hidden states, so their vocabulary is of type `none`; llama.cpp still wants `token_embd`: in
the middle a single row of zeros, at the end the output head, which llama.cpp takes from there when
`output` is absent.  Some architectures insist on both: the one that a stage does not use is then
zeros, in the type that takes least room.  What is small goes everywhere.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Final

from shardmesh.errors import GgufError
from shardmesh.shards.architectures import rules_for
from shardmesh.shards.gguf_check import ALIGNMENT_KEY
from shardmesh.shards.gguf_file import GgufFile, Tensor
from shardmesh.shards.gguf_values import MetadataValue, string, uint32
from shardmesh.shards.layers import LayerRange
from shardmesh.shards.slice_metadata import cut_metadata

EMBEDDING: Final = "token_embd.weight"
HEAD: Final = "output.weight"
OUTPUT_NORM: Final = "output_norm.weight"
SHARED: Final = frozenset(
    {
        OUTPUT_NORM,
        "output_norm.bias",
        "rope_freqs.weight",
        "rope_factors_long.weight",
        "rope_factors_short.weight",
        # Of the input; llama.cpp wants them on later stages too, where their result is replaced.
        "token_embd_norm.weight",
        "token_embd_norm.bias",
        "position_embd.weight",
        # Make one of the several hidden states of a token.
        "output_hc_fn.weight",
        "output_hc_base.weight",
        "output_hc_scale.weight",
        "output_hc_norm.weight",
        "output_hc_down.weight",
        "output_hc_up.weight",
    }
)
OF_FIRST: Final = frozenset({"per_layer_token_embd.weight"})
HEAD_BIAS: Final = "output.bias"
NOT_GENERATING: Final = frozenset({"cls.output.weight", "cls.output.bias"})
"""For ranking texts; a mesh writes them, and llama.cpp does without."""

WIDTH_MAX: Final = 2**31 - 1
"""Rows and columns of the embedding: llama.cpp keeps them in 32 bits."""

_BLOCK: Final = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\.(.+)")
_F32: Final = 0
_SMALL_TYPES: Final = ((256, 19, 50), (32, 2, 18))
"""Values in a block, ggml type, bytes of a block: IQ1_S, Q4_0."""


@dataclasses.dataclass(frozen=True)
class ShardTensor:
    """A tensor of a shard file and where its bytes come from; zeros without a source."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    n_bytes: int
    source: Tensor | None


@dataclasses.dataclass(frozen=True)
class FileContents:
    """All that a GGUF file to be written consists of."""

    metadata: Mapping[str, MetadataValue]
    tensors: tuple[ShardTensor, ...]


@dataclasses.dataclass(frozen=True)
class SortedTensors:
    """A model's tensors by their place in it."""

    layers: tuple[tuple[tuple[str, Tensor], ...], ...]  # of each layer: name behind the number
    embedding: Tensor
    head: Tensor | None  # None: the embedding is the head too
    shared: tuple[Tensor, ...]
    of_first: tuple[Tensor, ...]  # looked up by tokens
    head_bias: Tensor | None
    needs_head: bool  # see `architectures`


def sort_tensors(model: GgufFile) -> SortedTensors:
    """Finds the place of every tensor; raises GgufError (theirs) if one has none."""
    rules = rules_for(model)
    if model.get_int("shardmesh.n_shards", 1) > 1:
        raise GgufError(
            f"{model.path} is a shard already",
            code="GGUF_UNSUITABLE",
            next_step="give the whole model that it was cut from",
        )
    layers: list[list[tuple[str, Tensor]]] = [[] for _ in range(model.n_layer)]
    others: dict[str, Tensor] = {}
    for tensor in model.tensors:
        block = _BLOCK.fullmatch(tensor.name)
        if block is None:
            others[tensor.name] = tensor
        elif model.n_layer <= int(block[1]) < model.n_layer + model.n_nextn:
            continue  # llama.cpp does without, too
        elif block[2] in rules.ignored:
            continue
        elif int(block[1]) < len(layers):
            layers[int(block[1])].append((block[2], tensor))
        else:
            raise _unsuitable(f"has tensor {tensor.name}, but only {len(layers)} layers")
    unknown = others.keys() - SHARED - OF_FIRST - NOT_GENERATING - {EMBEDDING, HEAD, HEAD_BIAS}
    if unknown:
        raise _unsuitable(f"has tensor {min(unknown)}, for which no rule is known")
    required = (EMBEDDING, HEAD) if rules.needs_head else (EMBEDDING,)
    missing = [name for name in required if name not in others]
    missing += [f"blk.{layer}.*" for layer, tensors in enumerate(layers) if not tensors]
    if missing:
        raise _unsuitable(f"has no tensor {missing[0]}")
    shape = others[EMBEDDING].shape
    if len(shape) != 2 or max(shape) > WIDTH_MAX:
        raise _unsuitable(f"has shape {list(shape)} in {EMBEDDING}")
    return SortedTensors(
        layers=tuple(tuple(layer) for layer in layers),
        embedding=others[EMBEDDING],
        head=others.get(HEAD),
        shared=tuple(tensor for name, tensor in others.items() if name in SHARED),
        of_first=tuple(tensor for name, tensor in others.items() if name in OF_FIRST),
        head_bias=others.get(HEAD_BIAS),
        needs_head=rules.needs_head,
    )


def shard_contents(
    model: GgufFile, layers: LayerRange, *, shard_id: int, n_shards: int, model_name: str
) -> FileContents:
    """What shard `shard_id` of a model consists of; raises GgufError (theirs)."""
    tensors = sort_tensors(model)
    n_layer = model.n_layer
    is_first, is_last = layers.layer_start == 0, layers.layer_end == n_layer
    metadata = cut_metadata(model, layers)
    if not is_first:
        n_vocab = tensors.embedding.shape[1] if is_last else 1
        metadata = {k: v for k, v in metadata.items() if not k.startswith("tokenizer.")}
        metadata["tokenizer.ggml.model"] = string("none")
        metadata[f"{model.architecture}.vocab_size"] = uint32(n_vocab)
    metadata |= {
        "shardmesh.shard_id": uint32(shard_id),
        "shardmesh.n_shards": uint32(n_shards),
        "shardmesh.layer_start": uint32(layers.layer_start),
        "shardmesh.layer_end": uint32(layers.layer_end),
        "shardmesh.n_layer": uint32(n_layer),
        "shardmesh.model_name": string(model_name),
    }
    own = shard_architecture(model)
    if own != model.architecture and layers.n_layer < n_layer:
        metadata = _renamed(metadata, model.architecture, own)
    return FileContents(metadata, tuple(_shard_tensors(tensors, layers, is_first, is_last)))


def first_layers(model: GgufFile, n_layer: int) -> FileContents:
    """A whole, shorter model of the first layers; raises GgufError (theirs)."""
    tensors, layers = sort_tensors(model), LayerRange(0, n_layer)
    parts = _shard_tensors(tensors, layers, is_first=True, is_last=True)
    return FileContents(cut_metadata(model, layers), tuple(parts))


def shard_architecture(model: GgufFile) -> str:
    """The architecture that a model's shards are files of, mostly its own."""
    others = dict(rules_for(model).computes_as)
    return others.get(model.n_layer, model.architecture)


def _renamed(
    metadata: Mapping[str, MetadataValue], architecture: str, other: str
) -> dict[str, MetadataValue]:
    """The same metadata under another architecture's name."""
    prefix = f"{architecture}."
    renamed = {
        f"{other}.{key.removeprefix(prefix)}" if key.startswith(prefix) else key: value
        for key, value in metadata.items()
    }
    return renamed | {"general.architecture": string(other)}


def tokenizer_contents(model: GgufFile) -> FileContents:
    """Vocabulary, special tokens and chat template: what llama.cpp loads with `vocab_only`."""
    if "tokenizer.ggml.model" not in model.metadata:
        raise _unsuitable("has no tokenizer")
    kept = ("general.", "tokenizer.", f"{model.architecture}.vocab_size")
    return FileContents(
        {k: v for k, v in model.metadata.items() if k.startswith(kept) and k != ALIGNMENT_KEY}, ()
    )


def zero_table(embedding: Tensor, name: str) -> ShardTensor:
    """Zeros of the shape of an embedding that nothing will read, in few bytes."""
    n_embd, n_vocab = embedding.shape
    for n_values, ggml_type, n_bytes in _SMALL_TYPES:
        if n_embd % n_values == 0:
            size = n_embd // n_values * n_bytes * n_vocab
            return ShardTensor(name, embedding.shape, ggml_type, size, None)
    return ShardTensor(name, embedding.shape, _F32, 4 * n_embd * n_vocab, None)


def _shard_tensors(
    tensors: SortedTensors, layers: LayerRange, is_first: bool, is_last: bool
) -> Iterator[ShardTensor]:
    yield from _vocabulary_tensors(tensors, is_first, is_last)
    for tensor in (*tensors.shared, *(tensors.of_first if is_first else ())):
        yield copied(tensor, tensor.name)
    for layer in range(layers.layer_start, layers.layer_end):
        for name, tensor in tensors.layers[layer]:
            yield copied(tensor, f"blk.{layer - layers.layer_start}.{name}")


def _vocabulary_tensors(
    tensors: SortedTensors, is_first: bool, is_last: bool
) -> Iterator[ShardTensor]:
    """Embedding, head and its bias, as large as a stage needs them."""
    embedding, head, bias = tensors.embedding, tensors.head, tensors.head_bias
    if not (is_first or is_last):
        n_embd = embedding.shape[0]
        for name in (EMBEDDING, HEAD) if tensors.needs_head else (EMBEDDING,):
            yield ShardTensor(name, (n_embd, 1), _F32, 4 * n_embd, None)
        if bias is not None:
            yield ShardTensor(HEAD_BIAS, (1,), _F32, 4, None)
        return
    if is_first:
        yield copied(embedding, EMBEDDING)
        if is_last and head is not None:
            yield copied(head, HEAD)
        elif tensors.needs_head:
            yield zero_table(embedding, HEAD)
    elif tensors.needs_head and head is not None:
        yield zero_table(embedding, EMBEDDING)
        yield copied(head, HEAD)
    else:
        yield copied(head or embedding, EMBEDDING)
    if bias is not None:
        yield copied(bias, HEAD_BIAS)


def copied(tensor: Tensor, name: str) -> ShardTensor:
    """A tensor as it is, under another name."""
    return ShardTensor(name, tensor.shape, tensor.ggml_type, tensor.n_bytes, tensor)


def _unsuitable(what: str) -> GgufError:
    return GgufError(
        f"the model {what[:300]}",
        code="GGUF_UNSUITABLE",
        next_step="use another GGUF file of this model; this one is incomplete or unusual",
    )
