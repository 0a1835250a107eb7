"""Numbers in llama.cpp's graph that it derives from the number of layers in a file.

For a few models such a number is not in the metadata: a shard, which has fewer layers, would get
another one.  They are factors of SCALE nodes, and stand in the node itself, so the callback that
llama.cpp asks before it computes a node sets them to what the whole model has.  The number that is
replaced is known beforehand: any other one means that the graph is not what it was thought to be.
"""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
from llama_cpp import _ggml

from shardmesh.errors import EngineError
from shardmesh.shards.architecture_rules import GraphConstants
from shardmesh.shards.architectures import RULES
from shardmesh.shards.gguf_file import GgufFile
from shardmesh.shards.patterns import recurrent_layers

_DECAYS_OF_A_LAYER = 4  # the rate, and the decays of queries, keys and within the batch
_DECAY_INPUTS = (b"slopes", b"q_decay_exp", b"k_decay_exp", b"diag_decay_exp")

_ggml_op_name = _ggml.libggml.ggml_op_name
_ggml_op_name.argtypes = [ctypes.c_int]
_ggml_op_name.restype = ctypes.c_char_p


class _TensorHead(ctypes.Structure):
    """The beginning of `struct ggml_tensor` of ggml.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("factor", ctypes.c_float),  # the first of 16 words of parameters
        ("parameters", ctypes.c_int32 * 15),
        ("flags", ctypes.c_int32),
        ("source", ctypes.c_void_p),  # the first of several
    )


@dataclasses.dataclass(frozen=True)
class Factors:
    """The factors of some nodes, in the order of the graph, and again from the start.

    A node is one of these if its name, or that of its source, has one of the words in it.
    """

    node_words: tuple[bytes, ...]
    source_words: tuple[bytes, ...]
    pairs: tuple[tuple[float, float], ...]  # llama.cpp's own for this file, and the whole model's


def factors_of(gguf: GgufFile) -> Factors | None:
    """The factors that a shard needs set; None if there are none."""
    n_layer = gguf.get_int("shardmesh.n_layer", gguf.n_layer)
    rules = RULES.get(gguf.architecture)
    if rules is None or rules.graph_constants is None or n_layer == gguf.n_layer:
        return None
    match rules.graph_constants:
        case GraphConstants.QUERY_SCALE:
            if n_layer not in rules.special_layer_counts:
                return None
            return Factors((), (b"Qcur-",), (_query_scales(gguf),))
        case GraphConstants.RESIDUAL_SCALE:
            pair = (_residual_scale(gguf.n_layer), _residual_scale(n_layer))
            return Factors((b"hidden_scaled",), (), (pair,))
        case GraphConstants.DECAY:
            return Factors((), _DECAY_INPUTS, _decays(gguf, n_layer))


class FactorSetter:
    """Sets the factors of one graph after the other."""

    def __init__(self, factors: Factors) -> None:
        self._factors = factors
        self._pairs = [(np.float32(own), np.float32(whole)) for own, whole in factors.pairs]
        self._n_seen = 0

    def start(self) -> None:
        """Called before each computation."""
        self._n_seen = 0

    def on_node(self, tensor: int, name: bytes, name_of: ctypes._FuncPointer) -> None:
        """Looks at a node before it is computed; raises EngineError (ours) for a strange graph."""
        head = _TensorHead.from_address(tensor)
        if _ggml_op_name(head.op) != b"SCALE":
            return
        factors = self._factors
        source = name_of(head.source) if factors.source_words else b""
        if not (
            any(word in name for word in factors.node_words)
            or any(word in source for word in factors.source_words)
        ):
            return
        own, whole = self._pairs[self._n_seen % len(self._pairs)]
        self._n_seen += 1
        if head.factor not in (float(own), float(whole)):  # a graph that is used again has ours
            raise EngineError(f"llama.cpp's graph has the factor {head.factor} and not {own}")
        head.factor = float(whole)

    def check(self) -> None:
        """Raises EngineError (ours) unless all factors were met since `start`."""
        if self._n_seen == 0 or self._n_seen % len(self._pairs):
            raise EngineError(f"llama.cpp's graph has {self._n_seen} of the expected factors")


def _query_scales(gguf: GgufFile) -> tuple[float, float]:
    prefix = gguf.architecture
    n_embd = gguf.get_int(f"{prefix}.embedding_length")
    n_head = gguf.get_per_layer(f"{prefix}.attention.head_count", gguf.n_layer, 1)[0]
    per_head = n_embd // max(1, n_head)
    width = gguf.get_int(f"{prefix}.attention.key_length", per_head)
    return _inverse_root(width), _inverse_root(per_head)


def _inverse_root(number: int) -> float:
    return float(np.float32(1) / np.sqrt(np.float32(number)))


def _residual_scale(n_layer: int) -> float:
    return float(np.float32(1.4) / np.sqrt(np.float32(n_layer)))


def _decays(gguf: GgufFile, n_layer: int) -> tuple[tuple[float, float], ...]:
    start = gguf.get_int("shardmesh.layer_start", 0)
    return tuple(
        (_decay(layer, gguf.n_layer), _decay(start + layer, n_layer))
        for layer, is_recurrent in enumerate(recurrent_layers(gguf))
        if is_recurrent
        for _ in range(_DECAYS_OF_A_LAYER)
    )


def _decay(layer: int, n_layer: int) -> float:
    return float(np.float32(1.0 - 1.0 * layer / (n_layer - 1) + 1e-5))
