"""Numbers of the graph that follow from the number of layers: which ones, and what is refused."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from shardmesh.engine.graph_constants import (
    Factors,
    FactorSetter,
    _ggml_op_name,
    _TensorHead,
    factors_of,
)
from shardmesh.errors import EngineError
from shardmesh.shards.gguf_file import GgufFile
from shardmesh.shards.gguf_values import MetadataValue, string, uint32


def shard(architecture: str, n_layer: int, whole: int, start: int, **values: int) -> GgufFile:
    metadata: dict[str, MetadataValue] = {"general.architecture": string(architecture)}
    metadata |= {f"{architecture}.{k.replace('__', '.')}": uint32(v) for k, v in values.items()}
    metadata[f"{architecture}.block_count"] = uint32(n_layer)
    metadata |= {
        "shardmesh.n_layer": uint32(whole),
        "shardmesh.layer_start": uint32(start),
        "shardmesh.n_shards": uint32(2),
    }
    return GgufFile(Path("m.gguf"), 3, 32, metadata, (), 0)


def op_number(wanted: bytes) -> int:
    return next(number for number in range(200) if _ggml_op_name(number) == wanted)


def node(factor: float, *, op: bytes = b"SCALE") -> _TensorHead:
    head = _TensorHead()
    head.op, head.factor, head.source = op_number(op), factor, 7
    return head


def name_of(address: int) -> bytes:
    return b"Qcur-3" if address == 7 else b""


def visit(setter: FactorSetter, head: _TensorHead, name: bytes = b"") -> None:
    setter.on_node(ctypes.addressof(head), name, name_of)  # type: ignore[arg-type]


GEMMA = {"embedding_length": 5376, "attention__head_count": 32, "attention__key_length": 128}


def test_gemma_of_the_one_size_scales_by_another_width() -> None:
    factors = factors_of(shard("gemma3", 31, 62, 31, **GEMMA))
    assert factors is not None
    ((own, whole),) = factors.pairs
    assert (own, whole) == (pytest.approx(128**-0.5), pytest.approx(168**-0.5))
    assert factors_of(shard("gemma3", 24, 48, 24, **GEMMA)) is None
    assert factors_of(shard("llama", 31, 62, 31, **GEMMA)) is None
    assert factors_of(shard("gemma3", 62, 62, 0, **GEMMA)) is None  # all layers: it is the whole


def test_decays_are_those_of_the_place_among_all() -> None:
    factors = factors_of(shard("minimax-01", 8, 16, 8, full_attention_interval=8))
    assert factors is not None
    assert len(factors.pairs) == 4 * 7
    assert factors.pairs[0] == (float(np.float32(1.00001)), float(np.float32(1 - 8 / 15 + 1e-5)))
    assert factors.pairs[-1] == (
        float(np.float32(1 - 6 / 7 + 1e-5)),
        float(np.float32(1 - 14 / 15 + 1e-5)),
    )


def test_a_factor_is_replaced_also_in_a_graph_that_is_used_again() -> None:
    setter = FactorSetter(Factors((), (b"Qcur-",), ((0.5, 0.25),)))
    head, other = node(0.5), node(0.5, op=b"MUL")
    for _ in range(2):
        setter.start()
        visit(setter, head)
        visit(setter, other)
        setter.check()
        assert (head.factor, other.factor) == (0.25, 0.5)


def test_factors_come_in_the_order_of_the_graph() -> None:
    setter = FactorSetter(Factors((b"scaled",), (), ((0.5, 0.25), (0.25, 0.125))))
    nodes = [node(0.5), node(0.25), node(0.5), node(0.25)]  # two parts of a batch
    setter.start()
    for head in nodes:
        visit(setter, head, b"hidden_scaled-0")
    setter.check()
    assert [head.factor for head in nodes] == [0.25, 0.125, 0.25, 0.125]


def test_a_graph_that_is_not_what_it_was_thought_to_be() -> None:
    setter = FactorSetter(Factors((), (b"Qcur-",), ((0.5, 0.25),)))
    with pytest.raises(EngineError, match=r"has the factor 0\.75"):
        visit(setter, node(0.75))
    setter.start()
    with pytest.raises(EngineError, match="0 of the expected"):
        setter.check()
