"""A GGUF file loaded by llama.cpp: its weights, and what the engine must know of them."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp import llama_cpp as api

from shardmesh.engine.base import EngineOptions
from shardmesh.engine.graph_constants import Factors, factors_of
from shardmesh.engine.kernels import use_own_kernels
from shardmesh.engine.large_pages import has_large_pages, is_room_for_copy
from shardmesh.engine.llama_log import route_log
from shardmesh.engine.options import KvShape, choose_flash_attention
from shardmesh.errors import EngineError
from shardmesh.memory import memory_free_bytes
from shardmesh.shards.architectures import PLAIN, RULES
from shardmesh.shards.gguf_file import GgufFile
from shardmesh.shards.row_width import n_streams_of

logger = logging.getLogger(__name__)

_MROPE_TYPES = (8, 40)
"""LLAMA_ROPE_TYPE_MROPE and _IMROPE: several positions for a token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardFacts:
    """What the header of a shard file says; a whole model is its own first and last stage."""

    architecture: str
    is_first: bool
    is_last: bool
    n_layer_model: int
    n_ctx_train: int
    n_ctx_original: int  # before its rotary positions were stretched; 0 if they were not
    kv: KvShape
    input_node: str  # where hidden states go in llama.cpp's graph; empty: its own input
    fed_as_tokens: bool  # the input itself gets tokens, whatever they are
    output_node: str  # where hidden states come out, without the number of the layer
    n_streams: int  # hidden states of a token, side by side
    factors: Factors | None  # numbers to set in the graph


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in memory and its numbers; whoever loads it frees it with `free_model`."""

    handle: Any
    facts: ShardFacts
    n_layer: int
    n_embd: int
    n_embd_input: int  # width of a row of `llama_batch.embd`; some architectures have room for more
    n_vocab: int  # 0 on stages that have no vocabulary
    has_rope_sections: bool


def read_facts(gguf: GgufFile) -> ShardFacts:
    """Raises GgufError (theirs) if a number is missing or of the wrong type."""
    architecture, n_layer = gguf.architecture, gguf.n_layer
    layer_end = gguf.get_int("shardmesh.layer_end", n_layer)
    rules = RULES.get(architecture, PLAIN)
    input_node = rules.input_node
    if rules.input_tensor not in ("", *(tensor.name for tensor in gguf.tensors)):
        input_node = ""
    is_first = gguf.get_int("shardmesh.layer_start", 0) == 0
    n_layer_model = gguf.get_int("shardmesh.n_layer", layer_end)
    return ShardFacts(
        architecture=architecture,
        is_first=is_first,
        is_last=layer_end == n_layer_model,
        n_layer_model=n_layer_model,
        n_ctx_train=gguf.get_int(f"{architecture}.context_length", 0),
        n_ctx_original=gguf.get_int(_original_context_key(architecture), 0),
        kv=_kv_shape(gguf, architecture, n_layer),
        input_node="" if is_first else input_node,
        fed_as_tokens=rules.fed_as_tokens and not is_first,
        output_node=rules.output_node,
        n_streams=n_streams_of(gguf, rules),
        factors=factors_of(gguf),
    )


def load_model(
    gguf: GgufFile, facts: ShardFacts, n_ctx: int, options: EngineOptions
) -> LoadedModel:
    """Loads the weights; raises EngineError (ours) if llama.cpp refuses the file."""
    route_log()
    api.llama_backend_init()
    if use_own_kernels(options.own_kernels):
        logger.debug("Shardmesh's own kernels compute what they can")
    params = api.llama_model_default_params()
    params.n_gpu_layers = options.n_gpu_layers
    if _are_copied(gguf.path, options):
        params.load_mode = api.LLAMA_LOAD_MODE_NONE
    n_ctx_total = n_ctx * options.n_parallel
    if n_ctx <= facts.n_ctx_original < n_ctx_total:
        # llama.cpp takes the whole unified cache for the length of one sequence, and would choose
        # the rotary factors for long texts because of the number of sequences.
        key = _original_context_key(facts.architecture)
        params.kv_overrides = _overrides({key: n_ctx_total})
    handle = api.llama_model_load_from_file(os.fsencode(gguf.path), params)
    if not handle:
        raise EngineError(
            f"llama.cpp could not load {gguf.path.name}",
            code="MODEL_NOT_LOADED",
            next_step="run with -v to see its own words; is there memory enough?",
        )
    return _describe(handle, facts)


def _are_copied(path: Path, options: EngineOptions) -> bool:
    """Whether the weights leave their file for memory in large pages."""
    if not options.large_pages or options.n_gpu_layers or not has_large_pages():
        return False
    return is_room_for_copy(path.stat().st_size, memory_free_bytes())


def free_model(model: LoadedModel) -> None:
    api.llama_model_free(model.handle)


def fingerprint(facts: ShardFacts, n_ctx: int, options: EngineOptions) -> str:
    """Names all that decides the bits: versions, instruction sets, devices, attention, KV types."""
    details = [
        api.llama_print_system_info().decode(),
        f"flash attention {choose_flash_attention(options)}",
        f"cache {options.cache_type_k} {options.cache_type_v}",
        f"stretched positions {bool(facts.n_ctx_original and n_ctx > facts.n_ctx_original)}",
        "gpu" if options.n_gpu_layers else "cpu",
    ]
    digest = hashlib.sha256("\n".join(details).encode()).hexdigest()[:12]
    version = api.llama_version().decode()
    return f"llama-cpp-python {llama_cpp.__version__}, llama.cpp {version}, {digest}"


def _describe(handle: Any, facts: ShardFacts) -> LoadedModel:
    n_vocab = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(handle)))
    return LoadedModel(
        handle=handle,
        facts=facts,
        n_layer=int(api.llama_model_n_layer(handle)),
        n_embd=int(api.llama_model_n_embd(handle)),
        n_embd_input=int(api.llama_model_n_embd_inp(handle)),
        n_vocab=n_vocab if facts.is_first or facts.is_last else 0,
        has_rope_sections=api.llama_model_rope_type(handle) in _MROPE_TYPES,
    )


def _kv_shape(gguf: GgufFile, architecture: str, n_layer: int) -> KvShape:
    """Widths summed over the layers; good enough to choose a context by."""
    n_embd = gguf.get_int(f"{architecture}.embedding_length", 0)
    heads = gguf.get_per_layer(f"{architecture}.attention.head_count", n_layer, 1)
    n_embd_head = n_embd // max(1, *heads)
    key = f"{architecture}.attention"
    if f"{key}.head_count_kv" in gguf.metadata:
        heads = gguf.get_per_layer(f"{key}.head_count_kv", n_layer, 1)
    return KvShape(
        n_embd_k=sum(heads) * gguf.get_int(f"{key}.key_length", n_embd_head),
        n_embd_v=sum(heads) * gguf.get_int(f"{key}.value_length", n_embd_head),
    )


def _original_context_key(architecture: str) -> str:
    return f"{architecture}.rope.scaling.original_context_length"


def _overrides(values: dict[str, int]) -> Any:
    """Metadata values that llama.cpp takes instead of the file's; a zeroed entry ends the list."""
    entries = (api.llama_model_kv_override * (len(values) + 1))()
    for entry, (key, value) in zip(entries, values.items(), strict=False):
        entry.tag = api.LLAMA_KV_OVERRIDE_TYPE_INT
        entry.key = key.encode()
        entry.value.val_i64 = value
    return entries
