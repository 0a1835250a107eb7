"""What llama.cpp derives from the number of layers in a file, written out as keys of each shard.

Taken from `load_arch_hparams` of the architectures in llama.cpp; with these keys a shard of any
length gets the values of the whole model.
"""

from __future__ import annotations

import math
import struct
from typing import Final

from shardmesh.shards.gguf_file import GgufFile
from shardmesh.shards.gguf_values import MetadataValue, float32, uint32

_LITE: Final = (26, 27)
_LITE_LONG: Final = (48, 128256)  # layers, and tokens of the vocabulary
_SIGMOID_LAYERS: Final = (47, 48)
_SIGMOID_VOCABULARY: Final = 154880
_SOFTMAX, _SIGMOID = 1, 2


def written_out(model: GgufFile) -> dict[str, MetadataValue]:
    """Keys with the whole model's values."""
    match model.architecture:
        case "minicpm":
            return _minicpm(model)
        case "deepseek2":
            return _deepseek2(model)
    return {}


def _minicpm(model: GgufFile) -> dict[str, MetadataValue]:
    if "minicpm.residual_scale" in model.metadata:
        return {}
    # Both roundings to 32 bits are llama.cpp's own.
    root = _to_float32(math.sqrt(model.n_layer))
    return {"minicpm.residual_scale": float32(_to_float32(1.4) / root)}


def _deepseek2(model: GgufFile) -> dict[str, MetadataValue]:
    n_layer, n_vocab = model.n_layer, _n_vocab(model)
    values = {}
    if n_layer in _LITE or (n_layer, n_vocab) == _LITE_LONG:
        values["deepseek2.attention.q_lora_rank"] = uint32(0)
    if not model.get_int("deepseek2.expert_gating_func", 0):
        is_sigmoid = n_layer in _SIGMOID_LAYERS and n_vocab == _SIGMOID_VOCABULARY
        values["deepseek2.expert_gating_func"] = uint32(_SIGMOID if is_sigmoid else _SOFTMAX)
    return values


def _n_vocab(model: GgufFile) -> int:
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    n_tokens = tokens.n_items if tokens is not None and tokens.is_array else 0
    return model.get_int(f"{model.architecture}.vocab_size", n_tokens)


def _to_float32(value: float) -> float:
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    return float(rounded)
