"""A bounded reader of GGUF headers: what a model file must pass before llama.cpp sees it.

Reads the header only, never the weights.  Every count is held against the bytes that remain before
memory is taken for it.  Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Final, NoReturn

from gguf.constants import GGML_QUANT_SIZES

from shardmesh.errors import GgufError
from shardmesh.shards.gguf_file import GgufFile, Tensor, refuse
from shardmesh.shards.gguf_parts import join_parts, part_paths
from shardmesh.shards.gguf_values import FIXED_BYTES, MetadataValue, ValueKind
from shardmesh.wire import limits

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
ALIGNMENT_DEFAULT: Final = 32
ALIGNMENT_KEY: Final = "general.alignment"

_READ_BYTES: Final = 1024 * 1024
_VALUE_BYTES_MIN: Final = 8 + 1 + 4 + 1
_TENSOR_BYTES_MIN: Final = 8 + 1 + 4 + 8 + 4 + 8
_TYPE_SIZES: Final = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}


def read_gguf(path: Path) -> GgufFile:
    """The header of a GGUF model; for `x-00001-of-00003.gguf` that of all parts together.

    Raises GgufError (theirs) for everything that is not a whole, well-formed model file.
    """
    paths = part_paths(path)
    return join_parts(path, [read_one_file(each) for each in paths])


def read_one_file(path: Path) -> GgufFile:
    """The header of one file, parts not joined; raises GgufError (theirs)."""
    try:
        n_bytes = path.stat().st_size
        if not path.is_file():
            raise GgufError(
                f"{path} is not a file",
                code="GGUF_UNREADABLE",
                next_step="give the path of a model in GGUF format",
            )
        with path.open("rb") as file:
            return _HeaderReader(path, file, n_bytes).read()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise GgufError(
            f"{path} cannot be read: {reason}",
            code="GGUF_UNREADABLE",
            next_step="check the path and its permissions",
        ) from error


class _HeaderReader:
    """Walks through one header, loading it piece by piece."""

    def __init__(self, path: Path, file: BinaryIO, n_bytes: int) -> None:
        self._path = path
        self._file = file
        self._n_bytes = n_bytes
        self._data = bytearray()
        self._at = 0

    def read(self) -> GgufFile:
        if self._n_bytes < 4 or self._take(4) != MAGIC:
            raise GgufError(
                f"{self._path} is not a GGUF file",
                code="GGUF_NOT_GGUF",
                next_step="give a model in GGUF format",
            )
        version = self._uint32()
        if version not in VERSIONS:
            self._refuse(f"has GGUF version {version}, only 2 and 3 can be read", "GGUF_VERSION")
        n_tensors = self._count(limits.GGUF_TENSORS_MAX, _TENSOR_BYTES_MIN, "tensors")
        n_values = self._count(limits.GGUF_VALUES_MAX, _VALUE_BYTES_MIN, "metadata values")
        metadata: dict[str, MetadataValue] = {}
        for _ in range(n_values):
            key = self._name(limits.GGUF_NAME_BYTES_MAX)
            if key in metadata:
                self._refuse(f"has the key {key} twice", "GGUF_VALUE")
            metadata[key] = self._value(key)
        alignment = self._alignment(metadata)
        infos = [self._tensor_info() for _ in range(n_tensors)]
        tensors = self._placed(infos, alignment)
        return GgufFile(
            self._path, version, alignment, MappingProxyType(metadata), tensors, self._n_bytes
        )

    # -- metadata --------------------------------------------------------------------------

    def _value(self, key: str) -> MetadataValue:
        kind = self._kind(key)
        if kind is not ValueKind.ARRAY:
            return MetadataValue(kind, self._items(key, kind, 1))
        kind = self._kind(key)
        if kind is ValueKind.ARRAY:
            self._refuse(f"has an array of arrays under {key}", "GGUF_VALUE")
        width = FIXED_BYTES.get(kind, 8)
        n_items = self._count(limits.GGUF_ARRAY_ITEMS_MAX, width, f"items under {key}")
        return MetadataValue(kind, self._items(key, kind, n_items), n_items, is_array=True)

    def _items(self, key: str, kind: ValueKind, n_items: int) -> bytes:
        if kind is ValueKind.STRING:
            return self._strings(n_items)
        payload = self._take(n_items * FIXED_BYTES[kind])
        if kind is ValueKind.BOOL and payload.strip(b"\x00\x01"):
            self._refuse(f"has a truth value other than 0 and 1 under {key}", "GGUF_VALUE")
        return payload

    def _strings(self, n_items: int) -> bytes:
        """Walks over strings: a vocabulary has 150,000, so this loop is kept tight."""
        start = at = self._at
        data, loaded = self._data, len(self._data)
        length_of = struct.Struct("<Q").unpack_from
        for _ in range(n_items):
            if at + 8 > loaded:
                loaded = self._load(at + 8)
            length = length_of(data, at)[0]
            if length > limits.GGUF_STRING_BYTES_MAX:
                self._refuse(f"has a string of {length} bytes", "GGUF_LIMIT")
            at += 8 + length
        self._load(at)
        self._at = at
        return bytes(memoryview(data)[start:at])

    def _kind(self, key: str) -> ValueKind:
        number = self._uint32()
        try:
            return ValueKind(number)
        except ValueError:
            self._refuse(f"has a value of unknown type {number} under {key}", "GGUF_VALUE")

    def _alignment(self, metadata: Mapping[str, MetadataValue]) -> int:
        value = metadata.get(ALIGNMENT_KEY)
        if value is None:
            return ALIGNMENT_DEFAULT
        alignment = value.items()[0] if value.kind is ValueKind.UINT32 and value.n_items else 0
        if (
            not isinstance(alignment, int)
            or value.is_array
            or not 0 < alignment <= limits.GGUF_ALIGNMENT_MAX
            or alignment & (alignment - 1)
        ):
            self._refuse("has an alignment that is no power of two", "GGUF_VALUE")
        return alignment

    # -- tensors ---------------------------------------------------------------------------

    def _tensor_info(self) -> Tensor:
        """A tensor, its offset still counted from the start of the weights."""
        name = self._name(limits.GGUF_TENSOR_NAME_BYTES_MAX)
        n_dimensions = self._uint32()
        if not 1 <= n_dimensions <= limits.GGUF_DIMENSIONS_MAX:
            self._refuse(f"has {n_dimensions} dimensions in tensor {name}", "GGUF_TENSOR")
        shape = struct.unpack(f"<{n_dimensions}Q", self._take(8 * n_dimensions))
        ggml_type, offset = struct.unpack("<IQ", self._take(12))
        n_bytes = tensor_n_bytes(shape, ggml_type)
        if n_bytes is None:
            self._refuse(
                f"has shape {list(shape)} with type {ggml_type} in tensor {name},"
                " which this version does not know",
                "GGUF_TENSOR",
            )
        return Tensor(name, shape, ggml_type, n_bytes, self._path, offset)

    def _placed(self, infos: list[Tensor], alignment: int) -> tuple[Tensor, ...]:
        """Tensors with absolute offsets, after checking that they share no byte."""
        if len({tensor.name for tensor in infos}) != len(infos):
            self._refuse("has two tensors of one name", "GGUF_TENSOR")
        start = -(-self._at // alignment) * alignment
        end = 0
        for tensor in sorted(infos, key=lambda tensor: tensor.offset):
            if tensor.offset % alignment:
                self._refuse(f"has tensor {tensor.name} at an unaligned offset", "GGUF_TENSOR")
            if tensor.offset < end:
                self._refuse(f"has tensor {tensor.name} overlapping another", "GGUF_TENSOR")
            end = tensor.offset + tensor.n_bytes
            if start + end > self._n_bytes:
                self._truncated(f"tensor {tensor.name} ends at byte {start + end}")
        return tuple(dataclasses.replace(each, offset=start + each.offset) for each in infos)

    # -- bytes -----------------------------------------------------------------------------

    def _uint32(self) -> int:
        return int.from_bytes(self._take(4), "little")

    def _count(self, maximum: int, item_bytes: int, what: str) -> int:
        n = int.from_bytes(self._take(8), "little")
        if n > maximum:
            self._refuse(f"claims {n} {what}, more than {maximum}", "GGUF_LIMIT")
        if n * item_bytes > self._n_bytes - self._at:
            self._truncated(f"{n} {what} do not fit")
        return n

    def _name(self, n_bytes_max: int) -> str:
        length = int.from_bytes(self._take(8), "little")
        if not 1 <= length <= n_bytes_max:
            self._refuse(f"has a name of {length} bytes", "GGUF_LIMIT")
        try:
            name = self._take(length).decode()
        except UnicodeDecodeError:
            self._refuse("has a name that is not UTF-8", "GGUF_VALUE")
        if not name.isprintable():
            self._refuse("has a name with unprintable characters", "GGUF_VALUE")
        return name

    def _take(self, n: int) -> bytes:
        start = self._at
        self._load(start + n)
        self._at = start + n
        return bytes(self._data[start : start + n])

    def _load(self, end: int) -> int:
        """Makes the first `end` bytes of the file available; gives how many there are."""
        if end > len(self._data):
            if end > self._n_bytes:
                self._truncated(f"its header needs {end} bytes")
            if end > limits.GGUF_HEADER_BYTES_MAX:
                self._refuse("has a header that is too long", "GGUF_LIMIT")
            self._data += self._file.read(max(end - len(self._data), _READ_BYTES))
            if end > len(self._data):
                self._truncated(f"its header needs {end} bytes")
        return len(self._data)

    def _truncated(self, detail: str) -> NoReturn:
        self._refuse(f"is cut off: {detail}, the file has {self._n_bytes}", "GGUF_TRUNCATED")

    def _refuse(self, what: str, code: str) -> NoReturn:
        refuse(self._path, what, code)


def tensor_n_bytes(shape: tuple[int, ...], ggml_type: int) -> int | None:
    """Bytes of a tensor; None for an unknown type, an empty dimension or half a block."""
    sizes = _TYPE_SIZES.get(ggml_type)
    if sizes is None or min(shape) < 1 or shape[0] % sizes[0]:
        return None
    return math.prod(shape) // sizes[0] * sizes[1]
