"""The model that is measured: a llama of 254 M parameters with random weights, made once."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import platformdirs

from shardmesh.demo_model import DEMO_MODEL
from shardmesh.errors import StorageError
from shardmesh.shards.atomic import atomic_file
from shardmesh.shards.gguf_check import read_gguf
from shardmesh.shards.gguf_values import MetadataValue, ValueKind, encode_string, string, uint32
from shardmesh.shards.gguf_write import encode_header, padded
from shardmesh.shards.slices import FileContents, ShardTensor

N_LAYER: Final = 16
N_EMBD: Final = 1024
N_FF: Final = 2816
N_HEAD: Final = 16
N_HEAD_KV: Final = 8
N_VOCAB: Final = 32_000
N_CTX_TRAIN: Final = 4096

RECIPE: Final = 1
"""Rises with each change of what is written, so that an older file is not taken for this one."""

_F32, _Q8_0 = 0, 8
_BLOCK_VALUES, _BLOCK_BYTES = 32, 34
_BLOCKS_AT_ONCE = 64 * 1024  # 2 MiB of weights
_UNUSED_TOKEN = 5
_DEVIATION_OF_BYTES = 73.3  # of whole numbers drawn evenly from -127..127
_HEAD_GAIN = 3.0  # deviation of a logit, so that the best token stands out


def big_model() -> Path:
    """The path of the model, which is written first if it is not there.

    Raises StorageError (ours) if it cannot be kept.
    """
    tokenizer = _tokenizer(read_gguf(DEMO_MODEL).metadata)
    encoded = b"".join(key.encode() + value.encode() for key, value in tokenizer.items())
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    folder = Path(platformdirs.user_cache_dir("shardmesh")) / "benchmarks"
    path = folder / f"llama-254m-q8_0-{RECIPE}-{digest}.gguf"
    if not path.exists():
        contents = FileContents({**_numbers(), **tokenizer}, tuple(_tensors()))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for outdated in folder.glob("llama-254m-*.gguf"):
                outdated.unlink(missing_ok=True)
            with atomic_file(path) as file:
                _write(file, contents)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _numbers() -> dict[str, MetadataValue]:
    own = {
        "block_count": N_LAYER,
        "context_length": N_CTX_TRAIN,
        "embedding_length": N_EMBD,
        "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": N_HEAD_KV,
        "rope.dimension_count": N_EMBD // N_HEAD,
        "vocab_size": N_VOCAB,
    }
    return {
        "general.architecture": string("llama"),
        "general.name": string("Random llama 254M"),
        "general.file_type": uint32(7),  # mostly Q8_0
        "general.quantization_version": uint32(2),
        **{f"llama.{key}": uint32(value) for key, value in own.items()},
        "llama.rope.freq_base": _float32(10_000.0),
        "llama.attention.layer_norm_rms_epsilon": _float32(1e-5),
    }


def _tokenizer(metadata: Mapping[str, MetadataValue]) -> dict[str, MetadataValue]:
    """The demo model's tokenizer with unused tokens up to N_VOCAB."""
    values = {k: v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    tokens = values["tokenizer.ggml.tokens"]
    missing = range(tokens.n_items, N_VOCAB)
    filler = {
        "tokenizer.ggml.tokens": b"".join(encode_string(f"<unused {n}>") for n in missing),
        "tokenizer.ggml.token_type": struct.pack("<i", _UNUSED_TOKEN) * len(missing),
        "tokenizer.ggml.scores": struct.pack("<f", 0.0) * len(missing),
    }
    for key in filler.keys() & values.keys():
        value = values[key]
        values[key] = dataclasses.replace(
            value, payload=value.payload + filler[key], n_items=N_VOCAB
        )
    return values


def _tensors() -> Iterator[ShardTensor]:
    n_kv = N_EMBD // N_HEAD * N_HEAD_KV
    matrices = {
        "attn_q": (N_EMBD, N_EMBD),
        "attn_k": (N_EMBD, n_kv),
        "attn_v": (N_EMBD, n_kv),
        "attn_output": (N_EMBD, N_EMBD),
        "ffn_gate": (N_EMBD, N_FF),
        "ffn_down": (N_FF, N_EMBD),
        "ffn_up": (N_EMBD, N_FF),
    }
    yield _tensor("token_embd", _Q8_0, N_EMBD, N_VOCAB)
    yield _tensor("output_norm", _F32, N_EMBD)
    yield _tensor("output", _Q8_0, N_EMBD, N_VOCAB)
    for layer in range(N_LAYER):
        yield _tensor(f"blk.{layer}.attn_norm", _F32, N_EMBD)
        yield _tensor(f"blk.{layer}.ffn_norm", _F32, N_EMBD)
        for name, shape in matrices.items():
            yield _tensor(f"blk.{layer}.{name}", _Q8_0, *shape)


def _tensor(name: str, ggml_type: int, *shape: int) -> ShardTensor:
    n_values = math.prod(shape)
    n_bytes = 4 * n_values if ggml_type == _F32 else n_values // _BLOCK_VALUES * _BLOCK_BYTES
    return ShardTensor(f"{name}.weight", shape, ggml_type, n_bytes, source=None)


def _float32(value: float) -> MetadataValue:
    return MetadataValue(ValueKind.FLOAT32, struct.pack("<f", value))


def _write(file: BinaryIO, contents: FileContents) -> None:
    """Header and weights, a few megabytes at a time; the same bytes each time."""
    generator = np.random.default_rng(RECIPE)
    file.write(encode_header(contents))
    for tensor in contents.tensors:
        if tensor.ggml_type == _F32:
            norm = generator.normal(1.0, 0.1, tensor.shape[0])
            file.write(norm.astype("<f4").tobytes())
        else:
            for piece in _blocks(generator, tensor):
                file.write(piece)
        file.write(bytes(padded(tensor.n_bytes) - tensor.n_bytes))


def _blocks(generator: np.random.Generator, tensor: ShardTensor) -> Iterator[bytes]:
    """Q8_0: a scale in f16 and 32 signed bytes; a matrix keeps the size of what it multiplies."""
    gain = {"token_embd.weight": math.sqrt(N_EMBD), "output.weight": _HEAD_GAIN}.get(
        tensor.name, 1.0
    )
    deviation = gain / math.sqrt(tensor.shape[0])
    n_left = tensor.n_bytes // _BLOCK_BYTES
    while n_left:
        n_blocks = min(n_left, _BLOCKS_AT_ONCE)
        blocks = np.empty(n_blocks, dtype=[("scale", "<f2"), ("values", "i1", _BLOCK_VALUES)])
        blocks["scale"] = deviation / _DEVIATION_OF_BYTES
        blocks["values"] = generator.integers(-127, 128, (n_blocks, _BLOCK_VALUES), np.int8)
        yield blocks.tobytes()
        n_left -= n_blocks
