"""The choices left open in EngineOptions, made from the model and the machine; pure functions."""

from __future__ import annotations

import dataclasses
import os

import psutil

from shardmesh.engine.base import EngineOptions
from shardmesh.errors import InputError
from shardmesh.wire.limits import SEQUENCES_MAX

N_CTX_DEFAULT_MAX = 4096
"""Context taken unasked; a model trained for 128 k tokens would fill the memory with KV."""

N_CTX_MIN = 256
"""llama.cpp rounds a context up to this."""

N_CTX_MAX = 2**24
"""Beyond what any model is trained for; larger numbers would overflow sizes in llama.cpp."""

KV_SHARE_OF_MEMORY = 0.5
"""Part of the free memory that an unasked-for context may take."""

N_THREADS_MAX = 512
"""Threads that ggml accepts (GGML_MAX_N_THREADS)."""


@dataclasses.dataclass(frozen=True)
class CacheType:
    """An element type of the KV cache: ggml's number for it, and bytes per element."""

    ggml_type: int
    n_bytes: float
    is_quantized: bool


CACHE_TYPES: dict[str, CacheType] = {
    "f32": CacheType(0, 4, False),
    "f16": CacheType(1, 2, False),
    "bf16": CacheType(30, 2, False),
    "q8_0": CacheType(8, 34 / 32, True),
    "q5_1": CacheType(7, 24 / 32, True),
    "q5_0": CacheType(6, 22 / 32, True),
    "q4_1": CacheType(3, 20 / 32, True),
    "q4_0": CacheType(2, 18 / 32, True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KvShape:
    """Numbers that one token takes in the KV cache of a shard, over all layers and KV heads."""

    n_embd_k: int
    n_embd_v: int

    def n_bytes(self, type_k: CacheType, type_v: CacheType) -> int:
        return int(self.n_embd_k * type_k.n_bytes + self.n_embd_v * type_v.n_bytes)


def check_options(options: EngineOptions) -> None:
    """Raises InputError (theirs) for a flag that cannot be used."""
    for name in (options.cache_type_k, options.cache_type_v):
        if name not in CACHE_TYPES:
            raise InputError(
                f"unknown cache type {name!r}", next_step=f"one of {', '.join(CACHE_TYPES)}"
            )
    if not 1 <= options.n_parallel <= SEQUENCES_MAX:
        raise InputError(
            f"--parallel must be 1 to {SEQUENCES_MAX}, not {options.n_parallel}",
            next_step="leave it out for 4",
        )
    if not 0 <= options.n_ctx * options.n_parallel <= N_CTX_MAX:
        raise InputError(
            f"--ctx-size times --parallel must be 0 to {N_CTX_MAX}",
            next_step="leave --ctx-size out for what suits the model and the memory",
        )
    if not 0 <= options.n_threads <= N_THREADS_MAX:
        raise InputError(
            f"--threads must be 0 to {N_THREADS_MAX}, not {options.n_threads}",
            next_step="leave it out for the cores less one",
        )
    if CACHE_TYPES[options.cache_type_v].is_quantized and options.flash_attention is False:
        raise InputError(
            "a quantized V cache needs flash attention",
            next_step="leave out --no-flash-attn, or use --cache-type-v f16",
        )


def choose_flash_attention(options: EngineOptions) -> bool:
    """Off unless asked for or needed.

    llama.cpp's own choice looks at the devices of the layers, so that the stages of one model
    could choose differently and no longer compute the bits of the whole model.
    """
    if options.flash_attention is not None:
        return options.flash_attention
    return CACHE_TYPES[options.cache_type_v].is_quantized


def choose_n_ctx(options: EngineOptions, n_ctx_train: int, kv: KvShape, n_bytes_free: int) -> int:
    """Tokens of one sequence: as asked, or what the model and the free memory allow."""
    if options.n_ctx:
        return options.n_ctx
    n_ctx = min(n_ctx_train or N_CTX_DEFAULT_MAX, N_CTX_DEFAULT_MAX)
    n_bytes_token = kv.n_bytes(CACHE_TYPES[options.cache_type_k], CACHE_TYPES[options.cache_type_v])
    room = n_bytes_free * KV_SHARE_OF_MEMORY
    while n_ctx > N_CTX_MIN and n_ctx * options.n_parallel * n_bytes_token > room:
        n_ctx //= 2
    return n_ctx


def choose_n_threads(options: EngineOptions) -> int:
    """As asked, or all but one of the physical cores that this process may run on.

    llama.cpp's threads spin while they wait: with one on each core, the thread that moves frames
    would not get to run.
    """
    if options.n_threads:
        return options.n_threads
    n_cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        n_cores = min(n_cores, len(os.sched_getaffinity(0)))
    return max(1, min(n_cores - 1, N_THREADS_MAX))
