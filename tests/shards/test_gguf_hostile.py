"""Model files made to do harm: each is refused by our own reader, before llama.cpp sees it.

The kinds are those of llama.cpp's tests/test-gguf.cpp and of the holes that were found in its
readers: counts, lengths and products that overflow (CVE-2024-23496, CVE-2025-53630,
CVE-2026-27940, CVE-2026-33298), types beyond the table, and numbers that contradict each other.
"""

from __future__ import annotations

import dataclasses
import struct
import tracemalloc
from pathlib import Path

import pytest
from support.models import array_value, bare_string, string_value, u32_value

from shardmesh.errors import GgufError
from shardmesh.shards.gguf_check import read_gguf
from shardmesh.shards.store import layers_of
from shardmesh.wire import limits
from shardmesh.wire.limits import MIB

F32, F16, Q8_0, Q4_K = 0, 1, 8, 12
U8, I8, U16, U32, F32_VALUE, BOOL, STRING, ARRAY, U64 = 0, 1, 2, 4, 6, 7, 8, 9, 10
HUGE = 2**64 - 1


@dataclasses.dataclass(frozen=True)
class Info:
    """What a header says about one tensor; nothing of it need be true."""

    name: bytes = b"a.weight"
    shape: tuple[int, ...] = (4, 2)
    kind: int = F32
    offset: int = 0
    n_name: int | None = None
    n_dimensions: int | None = None

    def encoded(self) -> bytes:
        n_name = len(self.name) if self.n_name is None else self.n_name
        n_dimensions = len(self.shape) if self.n_dimensions is None else self.n_dimensions
        return (
            struct.pack("<Q", n_name)
            + self.name
            + struct.pack("<I", n_dimensions)
            + struct.pack(f"<{len(self.shape)}Q", *self.shape)
            + struct.pack("<IQ", self.kind, self.offset)
        )


MODEL = {
    b"general.architecture": string_value("llama"),
    b"llama.block_count": u32_value(2),
}


def a_file(
    *infos: Info,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_values: int | None = None,
    values: dict[bytes, bytes] | None = None,
    raw_values: bytes = b"",
    n_weight_bytes: int = 64,
    alignment: int = 32,
) -> bytes:
    entries = {**MODEL, **(values or {})}
    encoded = b"".join(struct.pack("<Q", len(k)) + k + v for k, v in entries.items()) + raw_values
    n_values = len(entries) if n_values is None else n_values
    n_tensors = len(infos) if n_tensors is None else n_tensors
    head = magic + struct.pack("<IQQ", version, n_tensors, n_values) + encoded
    head += b"".join(info.encoded() for info in infos)
    return head + bytes(-len(head) % alignment) + bytes(n_weight_bytes)


def value(data: bytes, **more: int) -> bytes:
    """A file with one hostile value in it."""
    return a_file(Info(), values={b"hostile": data}, **more)  # type: ignore[arg-type]


def array(kind: int, n_items: int, items: bytes = b"") -> bytes:
    return value(struct.pack("<IIQ", ARRAY, kind, n_items) + items)


GOOD = {
    "nothing hostile": a_file(Info(), Info(b"b", (8,), offset=32)),
    "version 2": a_file(Info(), version=2),
    "no tensors": a_file(n_weight_bytes=0),
    "four dimensions": a_file(Info(shape=(2, 2, 2, 2))),
    "the longest tensor name": a_file(Info(b"x" * 63)),
    "the largest alignment": a_file(
        Info(),
        values={b"general.alignment": u32_value(65536)},
        alignment=65536,
    ),
    "an empty array": array(U32, 0),
    "a string that is not UTF-8": value(struct.pack("<IQ", STRING, 2) + b"\xff\xfe"),
}

HOSTILE = {
    # the header
    "empty": (b"", "GGUF_NOT_GGUF"),
    "three bytes": (b"GGU", "GGUF_NOT_GGUF"),
    "another magic": (a_file(magic=b"GGML"), "GGUF_NOT_GGUF"),
    "the magic backwards": (a_file(magic=b"FUGG"), "GGUF_NOT_GGUF"),
    "version 0": (a_file(version=0), "GGUF_VERSION"),
    "version 1": (a_file(version=1), "GGUF_VERSION"),
    "version 4": (a_file(version=4), "GGUF_VERSION"),
    "big-endian": (a_file(version=3 << 24), "GGUF_VERSION"),
    "cut after the version": (b"GGUF" + struct.pack("<I", 3), "GGUF_TRUNCATED"),
    "cut inside the counts": (a_file()[:20], "GGUF_TRUNCATED"),
    # counts
    "2^64 tensors": (a_file(Info(), n_tensors=HUGE), "GGUF_LIMIT"),
    "one tensor too many": (
        a_file(Info(), n_tensors=limits.GGUF_TENSORS_MAX + 1),
        "GGUF_LIMIT",
    ),
    "tensors that do not fit": (a_file(Info(), n_tensors=1000), "GGUF_TRUNCATED"),
    "2^63 values": (a_file(Info(), n_values=2**63), "GGUF_LIMIT"),
    "one value too many": (a_file(Info(), n_values=limits.GGUF_VALUES_MAX + 1), "GGUF_LIMIT"),
    "values that do not fit": (a_file(Info(), n_values=1000), "GGUF_TRUNCATED"),
    # keys
    "a key of no letters": (a_file(values={b"": u32_value(1)}), "GGUF_LIMIT"),
    "a key of 2^64 letters": (
        a_file(raw_values=struct.pack("<Q", HUGE) + b"x" * 16, n_values=3),
        "GGUF_LIMIT",
    ),
    "a key one letter too long": (
        a_file(values={b"k" * (limits.GGUF_NAME_BYTES_MAX + 1): u32_value(1)}),
        "GGUF_LIMIT",
    ),
    "a key longer than the file": (
        a_file(raw_values=struct.pack("<Q", 60_000) + b"x" * 16, n_values=3),
        "GGUF_TRUNCATED",
    ),
    "a key that is not UTF-8": (a_file(values={b"\xff\xfe": u32_value(1)}), "GGUF_VALUE"),
    "a key with a zero": (a_file(values={b"a\0b": u32_value(1)}), "GGUF_VALUE"),
    "a key with an escape code": (a_file(values={b"\x1b[2J": u32_value(1)}), "GGUF_VALUE"),
    "a key twice": (
        a_file(raw_values=bare_string("llama.block_count") + u32_value(9), n_values=3),
        "GGUF_VALUE",
    ),
    # values
    "a type beyond the table": (value(struct.pack("<I", 13) + bytes(8)), "GGUF_VALUE"),
    "a type of 2^32 - 1": (value(struct.pack("<I", 2**32 - 1) + bytes(8)), "GGUF_VALUE"),
    "a truth of 2": (value(struct.pack("<IB", BOOL, 2)), "GGUF_VALUE"),
    "a truth of 255 in an array": (array(BOOL, 3, b"\0\1\xff"), "GGUF_VALUE"),
    "a string of 2^64 bytes": (value(struct.pack("<IQ", STRING, HUGE)), "GGUF_LIMIT"),
    "a string one byte too long": (
        value(struct.pack("<IQ", STRING, limits.GGUF_STRING_BYTES_MAX + 1)),
        "GGUF_LIMIT",
    ),
    "a string longer than the file": (
        value(struct.pack("<IQ", STRING, 100_000)),
        "GGUF_TRUNCATED",
    ),
    "an array of arrays": (array(ARRAY, 1, bytes(16)), "GGUF_VALUE"),
    "an array of an unknown type": (array(99, 1, bytes(16)), "GGUF_VALUE"),
    "an array of 2^64 bytes": (array(U8, HUGE), "GGUF_LIMIT"),
    "an array whose bytes overflow": (array(U64, 2**61), "GGUF_LIMIT"),
    "an array one item too long": (array(U8, limits.GGUF_ARRAY_ITEMS_MAX + 1), "GGUF_LIMIT"),
    "an array longer than the file": (array(U32, 1_000_000), "GGUF_TRUNCATED"),
    "an array of strings that lie about their length": (
        array(STRING, 2, struct.pack("<Q", 1) + b"a" + struct.pack("<Q", HUGE)),
        "GGUF_LIMIT",
    ),
    "an array of strings that do not fit": (array(STRING, 100_000), "GGUF_TRUNCATED"),
    # alignment
    "an alignment of 0": (
        a_file(Info(), values={b"general.alignment": u32_value(0)}),
        "GGUF_VALUE",
    ),
    "an alignment of 13": (
        a_file(Info(), values={b"general.alignment": u32_value(13)}),
        "GGUF_VALUE",
    ),
    "an alignment of 2^31": (
        a_file(Info(), values={b"general.alignment": u32_value(2**31)}),
        "GGUF_VALUE",
    ),
    "an alignment as a text": (
        a_file(Info(), values={b"general.alignment": string_value("32")}),
        "GGUF_VALUE",
    ),
    "an alignment as a list": (
        a_file(Info(), values={b"general.alignment": array_value(U32, [bytes([32, 0, 0, 0])])}),
        "GGUF_VALUE",
    ),
    # tensors
    "a tensor without a name": (a_file(Info(b"")), "GGUF_LIMIT"),
    "a tensor name one letter too long": (a_file(Info(b"x" * 64)), "GGUF_LIMIT"),
    "a tensor name of 2^64 letters": (a_file(Info(n_name=HUGE)), "GGUF_LIMIT"),
    "a tensor name with a zero": (a_file(Info(b"a\0.weight")), "GGUF_VALUE"),
    "a tensor twice": (a_file(Info(), Info(offset=32)), "GGUF_TENSOR"),
    "no dimensions": (a_file(Info(shape=())), "GGUF_TENSOR"),
    "five dimensions": (a_file(Info(shape=(1, 1, 1, 1, 1))), "GGUF_TENSOR"),
    "2^32 - 1 dimensions": (a_file(Info(n_dimensions=2**32 - 1)), "GGUF_TENSOR"),
    "an empty dimension": (a_file(Info(shape=(4, 0))), "GGUF_TENSOR"),
    "a dimension of 2^63": (a_file(Info(shape=(2**63,))), "GGUF_TRUNCATED"),
    "a product of 2^64, which is 0": (a_file(Info(shape=(2**32, 2**32))), "GGUF_TRUNCATED"),
    "a product that is small modulo 2^64": (
        a_file(Info(shape=(2**32 + 4, 2**32, 1, 1))),
        "GGUF_TRUNCATED",
    ),
    "a size whose padding overflows": (
        a_file(Info(shape=(2**62 - 4,), kind=F32)),
        "GGUF_TRUNCATED",
    ),
    "an unknown tensor type": (a_file(Info(kind=200)), "GGUF_TENSOR"),
    "a tensor type of 2^32 - 1": (a_file(Info(kind=2**32 - 1)), "GGUF_TENSOR"),
    "a tensor type that was removed": (a_file(Info(kind=4)), "GGUF_TENSOR"),
    "half a block of Q8_0": (a_file(Info(shape=(16,), kind=Q8_0)), "GGUF_TENSOR"),
    "half a block of Q4_K": (a_file(Info(shape=(128,), kind=Q4_K)), "GGUF_TENSOR"),
    "an unaligned offset": (a_file(Info(offset=33)), "GGUF_TENSOR"),
    "an offset at the end of the file": (a_file(Info(offset=64)), "GGUF_TRUNCATED"),
    "an offset of 2^64 - 32": (a_file(Info(offset=2**64 - 32)), "GGUF_TRUNCATED"),
    "two tensors in one place": (a_file(Info(), Info(b"b")), "GGUF_TENSOR"),
    "a tensor reaching into the next": (
        a_file(Info(shape=(4, 4)), Info(b"b", offset=32)),
        "GGUF_TENSOR",
    ),
    "weights cut by a byte": (a_file(Info(shape=(16,)), n_weight_bytes=63), "GGUF_TRUNCATED"),
    "no weights": (a_file(Info(), n_weight_bytes=0), "GGUF_TRUNCATED"),
    # numbers that contradict each other
    "no layers": (a_file(values={b"llama.block_count": u32_value(0)}), "GGUF"),
    "more layers than llama.cpp takes": (
        a_file(values={b"llama.block_count": u32_value(limits.MODEL_LAYERS_MAX + 1)}),
        "GGUF",
    ),
    "2^32 - 1 layers": (a_file(values={b"llama.block_count": u32_value(2**32 - 1)}), "GGUF"),
    "layers as a text": (a_file(values={b"llama.block_count": string_value("2")}), "GGUF"),
    "no architecture": (
        a_file(values={b"general.architecture": u32_value(1)}),
        "GGUF",
    ),
    "a range that ends before it starts": (
        a_file(
            values={b"shardmesh.layer_start": u32_value(4), b"shardmesh.layer_end": u32_value(2)}
        ),
        "BAD_SHARD",
    ),
    "a range longer than its layers": (
        a_file(
            values={
                b"shardmesh.layer_start": u32_value(0),
                b"shardmesh.layer_end": u32_value(3),
                b"shardmesh.n_layer": u32_value(8),
            }
        ),
        "BAD_SHARD",
    ),
    "a range beyond the model": (
        a_file(
            values={
                b"shardmesh.layer_start": u32_value(7),
                b"shardmesh.layer_end": u32_value(9),
                b"shardmesh.n_layer": u32_value(8),
            }
        ),
        "BAD_SHARD",
    ),
    "a tensor of a layer that is not there": (a_file(Info(b"blk.2.attn_q.weight")), "BAD_SHARD"),
    "a tensor of layer 10^30": (a_file(Info(b"blk." + b"9" * 30 + b".x")), "BAD_SHARD"),
}
CUT_ANYWHERE = a_file(Info(), Info(b"b", (8,), offset=32), values={b"w": string_value("x")})


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 40


def read(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    layers_of(read_gguf(path))


@pytest.mark.parametrize("name", GOOD)
def test_what_is_unusual_but_right_is_read(tmp_path: Path, name: str) -> None:
    read(tmp_path / "model.gguf", GOOD[name])


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_refused_without_taking_memory(tmp_path: Path, name: str) -> None:
    data, code = HOSTILE[name]
    path = tmp_path / "model.gguf"
    tracemalloc.start()
    try:
        with pytest.raises(GgufError) as caught:
            read(path, data)
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()
    assert caught.value.code.startswith(code)
    assert caught.value.next_step
    assert "\x1b" not in str(caught.value), "a terminal would obey it"
    assert len(str(caught.value)) < 1000 + len(str(path))
