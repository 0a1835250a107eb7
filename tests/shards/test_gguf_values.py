"""Metadata values: kept to the byte, cut by layer."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import array_value, bare_string, string_value, u32_value

from shardmesh.shards.gguf_values import MetadataValue, ValueKind, string, uint32


def test_values_are_encoded_as_the_format_has_them() -> None:
    assert uint32(7).encode() == u32_value(7)
    assert string("ü").encode() == string_value("ü")


@given(numbers=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1), data=st.data())
def test_a_cut_array_has_the_items_of_its_range(numbers: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(numbers) - 1))
    end = data.draw(st.integers(start + 1, len(numbers)))
    payload = struct.pack(f"<{len(numbers)}i", *numbers)
    value = MetadataValue(ValueKind.INT32, payload, len(numbers), is_array=True)
    cut = value.cut(start, end)
    assert cut.items() == tuple(numbers[start:end])
    assert cut.encode() == array_value(5, [struct.pack("<i", n) for n in numbers[start:end]])


def test_strings_that_are_no_text_stay_what_they_are() -> None:
    raw = [b"one", b"\xff\xfe", b"", b"four"]
    payload = b"".join(struct.pack("<Q", len(each)) + each for each in raw)
    value = MetadataValue(ValueKind.STRING, payload, 4, is_array=True)
    assert value.items() == ("one", "\ufffd\ufffd", "", "four")
    assert value.cut(1, 3).payload == payload[11:29]
    assert value.cut(3, 4).encode() == array_value(8, [bare_string("four")])


@pytest.mark.parametrize(
    ("kind", "payload", "items"),
    [
        (ValueKind.BOOL, b"\x01\x00\x01", (True, False, True)),
        (ValueKind.UINT8, b"\x01\xff\x02", (1, 255, 2)),
        (ValueKind.FLOAT64, struct.pack("<3d", 0.5, -1.0, 2.0), (0.5, -1.0, 2.0)),
    ],
)
def test_items_of_every_width(kind: ValueKind, payload: bytes, items: tuple[object, ...]) -> None:
    value = MetadataValue(kind, payload, 3, is_array=True)
    assert value.items() == items
    assert value.cut(2, 3).items() == items[2:]
