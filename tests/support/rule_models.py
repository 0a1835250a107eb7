"""Small models for the rules of `shards/architectures.py`: one for each kind of rule.

Made from the llama and phi3 models of `support.models`, whose layers these architectures share but
for a few tensors and values.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import gguf
import numpy as np
from support.models import (
    BUILT_IN,
    TensorData,
    f32_value,
    raw_metadata,
    string_value,
    u32_value,
    write_gguf,
    write_model,
)

from shardmesh.shards.gguf_values import uint32s

N_LAYER = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentLayers:
    """Layers that have something else in the place of attention."""

    numbers: tuple[int, ...]
    left_out: tuple[str, ...]  # names of tensors
    matrices: tuple[tuple[str, tuple[int, ...]], ...]  # instead of those of the other layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleModel:
    """How an architecture differs from the one that its model is made from."""

    base: str = "llama"
    tied: bool = False
    values: dict[str, bytes] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()  # ends of tensor names
    norms: tuple[str, ...] = ()  # further ones in each block
    n_layer: int = N_LAYER
    matrices: tuple[tuple[str, tuple[int, ...]], ...] = ()  # further ones in each block
    recurrent: RecurrentLayers | None = None
    outside: tuple[tuple[str, tuple[int, ...]], ...] = ()  # further ones outside the blocks


RULE_MODELS = {
    # The input is scaled by the root of the width, here no power of two: no quotient is exact.
    "gemma": RuleModel(tied=True),
    # A key scales the input.
    "granite": RuleModel(
        values={
            "embedding_scale": f32_value(12.0),
            "residual_scale": f32_value(0.3),
            "logit_scale": f32_value(2.0),
        }
    ),
    # Windows by a period that no key tells, and an abort without a layer that has one.
    "cohere2": RuleModel(
        tied=True,
        values={
            "attention.sliding_window": u32_value(8),
            "attention.layer_norm_epsilon": f32_value(1e-5),
            "logit_scale": f32_value(1.0),
        },
        left_out=("ffn_norm.weight",),
    ),
    # The head does not fall back to the embedding.
    "internlm2": RuleModel(),
    # Every fourth layer does not rotate, counted from the first of a file.
    "smollm3": RuleModel(),
    # A model of just this length scales by another width, and no key says so.
    "gemma3": RuleModel(
        base="qwen3",
        tied=True,
        n_layer=62,
        values={"attention.sliding_window": u32_value(8)},
        norms=("post_attention_norm", "post_ffw_norm"),
    ),
    # The scale of the residuals follows from the number of layers.
    "minicpm3": RuleModel(
        values={
            "attention.q_lora_rank": u32_value(16),
            "attention.kv_lora_rank": u32_value(24),
            "attention.head_count_kv": u32_value(4),
            "attention.key_length": u32_value(24),
            "attention.value_length": u32_value(24),
            "rope.dimension_count": u32_value(8),
        },
        left_out=("attn_q.weight", "attn_k.weight", "attn_v.weight"),
        matrices=(
            ("attn_q_a", (96, 16)),
            ("attn_q_b", (16, 96)),
            ("attn_kv_a_mqa", (96, 32)),
            ("attn_kv_b", (24, 160)),
            ("attn_q_a_norm", (16,)),
            ("attn_kv_a_norm", (24,)),
        ),
    ),
    # With 32 layers llama.cpp turns positions, with others it does not.
    "baichuan": RuleModel(n_layer=32),
    # Four hidden states of a token, side by side.
    "hy_v4": RuleModel(
        values={
            "leading_dense_block_count": u32_value(N_LAYER),
            "expert_feed_forward_length": u32_value(32),
            "expert_shared_count": u32_value(1),
            "attention.q_lora_rank": u32_value(16),
            "attention.kv_lora_rank": u32_value(24),
            "attention.head_count_kv": u32_value(1),
            "attention.key_length": u32_value(32),
            "attention.value_length": u32_value(24),
            "attention.key_length_mla": u32_value(24),
            "attention.value_length_mla": u32_value(24),
            "rope.dimension_count": u32_value(8),
            "hyper_connection.count": u32_value(4),
            "hyper_connection.epsilon": f32_value(1e-6),
            "hyper_connection.magnitude": f32_value(2.0),
        },
        left_out=("attn_q.weight", "attn_k.weight", "attn_v.weight"),
        matrices=(
            ("attn_sinks", (4,)),
            ("attn_q_a", (96, 16)),
            ("attn_q_a_norm", (16,)),
            ("attn_q_b", (16, 96)),
            ("attn_kv_a_mqa", (96, 32)),
            ("attn_kv_a_norm", (24,)),
            ("attn_k_b", (16, 24, 4)),
            ("attn_v_b", (24, 24, 4)),
            ("attn_gate", (96, 96)),
            ("hc_attn_fn", (384, 8)),
            ("hc_attn_base", (8,)),
            ("hc_attn_scale", (2,)),
            ("hc_ffn_fn", (384, 8)),
            ("hc_ffn_base", (8,)),
            ("hc_ffn_scale", (2,)),
        ),
        outside=(
            ("output_hc_fn", (384, 4)),
            ("output_hc_base", (4,)),
            ("output_hc_scale", (1,)),
        ),
    ),
    # Attention and recurrent layers: which are which is told per layer.
    "lfm2": RuleModel(
        tied=True,
        values={
            "attention.head_count_kv": uint32s([0, 0, 2, 0, 2, 0, 0, 2]).encode(),
            "shortconv.l_cache": u32_value(3),
        },
        left_out=("output_norm.weight",),
        matrices=(("attn_q_norm", (24,)), ("attn_k_norm", (24,))),
        recurrent=RecurrentLayers(
            numbers=(0, 1, 3, 5, 6),
            left_out=("attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight"),
            matrices=(
                ("shortconv.in_proj", (96, 288)),
                ("shortconv.conv", (3, 96)),
                ("shortconv.out_proj", (96, 96)),
            ),
        ),
        outside=(("token_embd_norm", (96,)),),
    ),
    # Hidden states would end the process: it takes them for an image.
    "glm4": RuleModel(base="phi3", norms=("post_attention_norm", "post_ffw_norm")),
}


def write_rule_model(path: Path, architecture: str, n_embd: int = 96) -> Path:
    """Writes the model of RULE_MODELS and returns `path`."""
    rule = RULE_MODELS[architecture]
    write_model(
        path, rule.base, n_layer=rule.n_layer, n_embd=n_embd, tied=rule.tied, vocabulary=BUILT_IN
    )
    metadata, tensors = read_model(path)
    metadata = {
        key.replace(f"{rule.base}.", f"{architecture}.", 1)
        if key.startswith(f"{rule.base}.")
        else key: value
        for key, value in metadata.items()
    }
    metadata["general.architecture"] = string_value(architecture)
    metadata |= {f"{architecture}.{key}": value for key, value in rule.values.items()}
    tensors = [tensor for tensor in tensors if not tensor.name.endswith(rule.left_out or ("?",))]
    generator = np.random.default_rng(0)
    for layer in range(rule.n_layer):
        matrices = rule.matrices
        if rule.recurrent is not None and layer in rule.recurrent.numbers:
            gone = tuple(f"blk.{layer}.{name}" for name in rule.recurrent.left_out)
            tensors = [tensor for tensor in tensors if tensor.name not in gone]
            matrices = rule.recurrent.matrices
        tensors += [
            _random_tensor(f"blk.{layer}.{name}", shape, generator) for name, shape in matrices
        ]
        for name in rule.norms:
            data = generator.normal(1.0, 0.1, n_embd).astype(np.float32).tobytes()
            tensors.append(TensorData(f"blk.{layer}.{name}.weight", (n_embd,), 0, data))
    tensors += [_random_tensor(name, shape, generator) for name, shape in rule.outside]
    return replace_model(path, metadata, tensors)


def _random_tensor(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> TensorData:
    data = generator.normal(0.0, shape[0] ** -0.5, math.prod(shape)).astype(np.float32)
    return TensorData(f"{name}.weight", shape, 0, data.tobytes())


def read_model(path: Path) -> tuple[dict[str, bytes], list[TensorData]]:
    """The encoded metadata and the tensors of a model."""
    tensors = [
        TensorData(
            tensor.name,
            tuple(int(n) for n in tensor.shape),
            int(tensor.tensor_type),
            tensor.data.tobytes(),
        )
        for tensor in gguf.GGUFReader(path).tensors
    ]
    return dict(raw_metadata(path.read_bytes())), tensors


def replace_model(path: Path, metadata: dict[str, bytes], tensors: list[TensorData]) -> Path:
    path.unlink()  # a reader may map it
    write_gguf(path, metadata, tensors)
    return path


def with_values(path: Path, **values: bytes) -> Path:
    """Adds metadata of the architecture to a model; `__` in a key stands for a dot."""
    metadata, tensors = read_model(path)
    architecture = metadata["general.architecture"][12:].decode()
    metadata |= {f"{architecture}.{k.replace('__', '.')}": v for k, v in values.items()}
    return replace_model(path, metadata, tensors)
