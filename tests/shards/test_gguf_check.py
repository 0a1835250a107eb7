"""The reader of model files: what it reads is right, and what is broken it refuses."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.models import (
    BUILT_IN,
    TensorData,
    array_value,
    bare_string,
    string_value,
    u32_value,
    write_gguf,
    write_model,
)

from shardmesh.errors import GgufError
from shardmesh.shards.gguf_check import read_gguf, tensor_n_bytes
from shardmesh.wire import limits

F32 = 0


def tiny(path: Path, **changes: bytes) -> Path:
    """A model file of some 500 bytes: three values and two tensors."""
    values = {
        "general.architecture": string_value("llama"),
        "llama.block_count": u32_value(1),
        "words": array_value(8, [bare_string("one"), bare_string("two")]),
        **changes,
    }
    weights = np.arange(16, dtype=np.float32).tobytes()
    tensors = [TensorData("a.weight", (4, 4), F32, weights), TensorData("b", (2,), F32, bytes(8))]
    write_gguf(path, values, tensors)
    return path


def refused_code(path: Path) -> str:
    with pytest.raises(GgufError) as caught:
        read_gguf(path)
    assert caught.value.next_step
    return caught.value.code


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny(tmp_path / "tiny.gguf")


def patched(path: Path, offset: int, data: bytes) -> Path:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("weights", ["f32", "q8_0", "q4_k"])
def test_reads_what_ggufs_own_reader_reads(tmp_path: Path, weights: str) -> None:
    path = write_model(tmp_path / "m.gguf", "mixtral", weights=weights, vocabulary=BUILT_IN)
    ours, theirs = read_gguf(path), GGUFReader(path)
    assert {t.name: (t.shape, t.offset, t.n_bytes) for t in ours.tensors} == {
        t.name: (tuple(int(n) for n in t.shape), t.data_offset, t.n_bytes) for t in theirs.tensors
    }
    for key, value in ours.metadata.items():
        expected = theirs.fields[key].contents()
        assert (list(value.items()) if value.is_array else value.items()[0]) == expected
    assert (ours.architecture, ours.n_layer) == ("llama", 4)


def test_every_ggml_type_has_the_size_that_gguf_gives() -> None:
    for kind in GGMLQuantizationType:
        block, n_bytes = GGML_QUANT_SIZES[kind]
        assert tensor_n_bytes((block * 3, 5), int(kind)) == n_bytes * 15
        assert block == 1 or tensor_n_bytes((block - 1, 5), int(kind)) is None


def test_a_file_cut_anywhere_is_refused(path: Path) -> None:
    content = path.read_bytes()
    last_byte = read_gguf(path).tensors[-1]
    for n_bytes in range(last_byte.offset + last_byte.n_bytes):
        path.write_bytes(content[:n_bytes])
        assert refused_code(path) in {"GGUF_NOT_GGUF", "GGUF_TRUNCATED"}, n_bytes


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offset=st.integers(0, 400), data=st.binary(min_size=1, max_size=8))
def test_any_patch_is_read_or_refused_but_nothing_else(
    tmp_path: Path, offset: int, data: bytes
) -> None:
    path = patched(tiny(tmp_path / "tiny.gguf"), offset, data)
    try:
        model = read_gguf(path)
    except GgufError:
        return
    assert all(each.offset + each.n_bytes <= path.stat().st_size for each in model.tensors)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_garbage_behind_the_magic_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "garbage.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + data)
    try:
        model = read_gguf(path)
    except GgufError:
        return
    assert not model.tensors


def test_other_files_are_told_apart(path: Path, tmp_path: Path) -> None:
    assert refused_code(tmp_path / "missing.gguf") == "GGUF_UNREADABLE"
    assert refused_code(tmp_path) == "GGUF_UNREADABLE"
    assert refused_code(patched(path, 4, struct.pack("<I", 1))) == "GGUF_VERSION"
    assert refused_code(patched(path, 4, struct.pack(">I", 3))) == "GGUF_VERSION"
    assert refused_code(patched(path, 0, b"GGML")) == "GGUF_NOT_GGUF"


@pytest.mark.parametrize("offset", [8, 16])
def test_huge_counts_are_refused_before_memory_is_taken(path: Path, offset: int) -> None:
    assert refused_code(patched(path, offset, b"\xff" * 8)) == "GGUF_LIMIT"


@pytest.mark.parametrize("offset", [8, 16])
def test_counts_that_the_file_cannot_hold_are_refused(path: Path, offset: int) -> None:
    assert refused_code(patched(path, offset, struct.pack("<Q", 60_000))) == "GGUF_TRUNCATED"


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (struct.pack("<II", 9, 9) + bytes(16), "GGUF_VALUE"),  # an array of arrays
        (struct.pack("<I", 13) + bytes(8), "GGUF_VALUE"),  # an unknown type
        (struct.pack("<IB", 7, 2), "GGUF_VALUE"),  # neither false nor true
        (struct.pack("<IIQ", 9, 4, 2**62), "GGUF_LIMIT"),
        (struct.pack("<IIQ", 9, 4, 4_000_000), "GGUF_TRUNCATED"),
        (struct.pack("<IQ", 8, 2**63), "GGUF_LIMIT"),
        (struct.pack("<IQ", 8, limits.GGUF_STRING_BYTES_MAX), "GGUF_TRUNCATED"),
    ],
)
def test_hostile_values_are_refused(tmp_path: Path, value: bytes, code: str) -> None:
    assert refused_code(tiny(tmp_path / "hostile.gguf", hostile=value)) == code


@pytest.mark.parametrize("alignment", [0, 3, 48, 2**31])
def test_alignments_are_powers_of_two(tmp_path: Path, alignment: int) -> None:
    path = tiny(tmp_path / "m.gguf", **{"general.alignment": u32_value(alignment)})
    assert refused_code(path) == "GGUF_VALUE"


@pytest.mark.parametrize(
    ("tensor", "code"),
    [
        (TensorData("a.weight", (2,), F32, bytes(8)), "GGUF_TENSOR"),  # a name twice
        (TensorData("x" * 64, (2,), F32, bytes(8)), "GGUF_LIMIT"),
        (TensorData("x\n", (2,), F32, bytes(8)), "GGUF_VALUE"),
        (TensorData("x", (), F32, bytes(8)), "GGUF_TENSOR"),
        (TensorData("x", (1, 1, 1, 1, 1), F32, bytes(8)), "GGUF_TENSOR"),
        (TensorData("x", (0,), F32, bytes(8)), "GGUF_TENSOR"),
        (TensorData("x", (31,), 8, bytes(34)), "GGUF_TENSOR"),  # half a block of Q8_0
        (TensorData("x", (2,), 99, bytes(8)), "GGUF_TENSOR"),
        (TensorData("x", (2**63, 2**63), F32, bytes(8)), "GGUF_TRUNCATED"),
        (TensorData("x", (2**32, 2**32), F32, bytes(8)), "GGUF_TRUNCATED"),  # 0 modulo 2**64
    ],
)
def test_hostile_tensors_are_refused(tmp_path: Path, tensor: TensorData, code: str) -> None:
    path = tmp_path / "hostile.gguf"
    write_gguf(path, {}, [TensorData("a.weight", (2,), F32, bytes(8)), tensor])
    assert refused_code(path) == code


@pytest.mark.parametrize(
    ("offset", "code"), [(0, "GGUF_TENSOR"), (33, "GGUF_TENSOR"), (2**63, "GGUF_TRUNCATED")]
)
def test_offsets_stay_in_the_file_and_apart(path: Path, offset: int, code: str) -> None:
    """The second tensor lies at 64; its offset are the last eight bytes of the header."""
    end = path.read_bytes().index(struct.pack("<IQ", F32, 64)) + 4
    assert refused_code(patched(path, end, struct.pack("<Q", offset))) == code


def test_a_key_may_stand_there_only_once(tmp_path: Path) -> None:
    path = tiny(tmp_path / "twice.gguf", word_=u32_value(1))
    path.write_bytes(path.read_bytes().replace(b"word_", b"words"))
    assert refused_code(path) == "GGUF_VALUE"


def test_missing_and_mistyped_values_are_named(path: Path, tmp_path: Path) -> None:
    model = read_gguf(path)
    with pytest.raises(GgufError, match="no whole number under nothing"):
        model.get_int("nothing")
    with pytest.raises(GgufError, match=r"no whole number under general\.architecture"):
        model.get_int("general.architecture")
    with pytest.raises(GgufError, match="no text under words"):
        model.get_text("words")
    assert model.get_int("nothing", 7) == 7
    many = tiny(tmp_path / "many.gguf", **{"llama.block_count": u32_value(513)})
    with pytest.raises(GgufError, match="has 513 layers"):
        _ = read_gguf(many).n_layer
