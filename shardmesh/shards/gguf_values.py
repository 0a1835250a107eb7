"""Metadata values of GGUF: kept encoded, so that what is copied stays the same to the byte.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Sequence
from typing import Final


class ValueKind(enum.IntEnum):
    """The types of metadata values, by their numbers in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


FORMAT: Final = {
    ValueKind.UINT8: "B",
    ValueKind.INT8: "b",
    ValueKind.UINT16: "H",
    ValueKind.INT16: "h",
    ValueKind.UINT32: "I",
    ValueKind.INT32: "i",
    ValueKind.FLOAT32: "f",
    ValueKind.BOOL: "?",
    ValueKind.UINT64: "Q",
    ValueKind.INT64: "q",
    ValueKind.FLOAT64: "d",
}
"""struct's letter for each kind of fixed size."""

FIXED_BYTES: Final = {kind: struct.calcsize(f"<{letter}") for kind, letter in FORMAT.items()}

Scalar = int | float | bool | str


@dataclasses.dataclass(frozen=True, repr=False)
class MetadataValue:
    """One value; `payload` are its encoded items, without the numbers in front of them."""

    kind: ValueKind  # of the value, or of each item of an array
    payload: bytes
    n_items: int = 1
    is_array: bool = False

    def items(self) -> tuple[Scalar, ...]:
        """The items of an array, or the one scalar; bytes that are no UTF-8 become U+FFFD."""
        if self.kind is not ValueKind.STRING:
            return struct.unpack(f"<{self.n_items}{FORMAT[self.kind]}", self.payload)
        return tuple(
            self.payload[start + 8 : end].decode(errors="replace")
            for start, end in self._string_spans()
        )

    def _string_spans(self) -> list[tuple[int, int]]:
        """Where each string's length starts and its text ends in the payload."""
        spans = []
        end = 0
        for _ in range(self.n_items):
            start = end
            end = start + 8 + int.from_bytes(self.payload[start : start + 8], "little")
            spans.append((start, end))
        return spans

    def encode(self) -> bytes:
        """Type, count if it is an array, and items, as they stand in a file."""
        if self.is_array:
            return struct.pack("<IIQ", ValueKind.ARRAY, self.kind, self.n_items) + self.payload
        return struct.pack("<I", self.kind) + self.payload

    def cut(self, start: int, end: int) -> MetadataValue:
        """Items `start` to `end - 1` of an array."""
        if self.kind is ValueKind.STRING:
            spans = self._string_spans()[start:end]
            payload = b"".join(self.payload[first:last] for first, last in spans)
        else:
            width = FIXED_BYTES[self.kind]
            payload = self.payload[start * width : end * width]
        return MetadataValue(self.kind, payload, end - start, is_array=True)

    def __repr__(self) -> str:
        what = f"{self.n_items} x {self.kind.name}" if self.is_array else repr(self.items()[0])
        return f"MetadataValue({what})"


def encode_string(text: str) -> bytes:
    """Length in eight bytes, then UTF-8."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def uint32(value: int) -> MetadataValue:
    return MetadataValue(ValueKind.UINT32, struct.pack("<I", value))


def uint32s(values: Sequence[int]) -> MetadataValue:
    """An array."""
    payload = struct.pack(f"<{len(values)}I", *values)
    return MetadataValue(ValueKind.UINT32, payload, len(values), is_array=True)


def float32(value: float) -> MetadataValue:
    return MetadataValue(ValueKind.FLOAT32, struct.pack("<f", value))


def string(text: str) -> MetadataValue:
    return MetadataValue(ValueKind.STRING, encode_string(text))


def bools(values: Sequence[bool]) -> MetadataValue:
    """An array."""
    return MetadataValue(ValueKind.BOOL, bytes(values), len(values), is_array=True)
