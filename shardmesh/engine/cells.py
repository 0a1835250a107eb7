"""The KV of a sequence as a row of bytes for each position, out of llama.cpp's state and into it.

llama.cpp gives the state of a whole sequence: numbers of cells, their positions, and then for each
layer all keys, and all values.  Here only keys and values are kept, position by position, so that
what was copied before need not be copied again, and so that nothing that llama.cpp parses comes
from another machine: numbers, positions, types and sizes are written by whoever takes the rows.
Pure.

A state, in a context with a cache for each sequence, little-endian:

    u32 that is always the same, u32 sequence; then one cache, or two (models with sliding windows):
        u32 number of sequences; for each of them
            u32 number of cells, and only if it is not 0:
                for each cell, in the order of positions: i32 position, u32 1, i32 sequence
                u32 whether values lie transposed, u32 number of layers
                for each layer: i32 type, u64 bytes of a row, the keys row by row
                for each layer: the same with values; transposed: i32 type, u32 bytes of a number,
                    u32 width, the values column by column

Of a cache with a sliding window only the positions are given that the next one may look at.  A copy
must have been begun before the first of them was left behind.
"""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import numpy.typing as npt

from shardmesh.engine.base import Cells
from shardmesh.wire.limits import MODEL_LAYERS_MAX

_CELL = np.dtype([("position", "<i4"), ("n_sequences", "<u4"), ("sequence", "<i4")])
_COUNT, _PAIR = struct.Struct("<I"), struct.Struct("<II")
_ROWS, _COLUMNS = struct.Struct("<iQ"), struct.Struct("<iII")


class UnknownStateError(Exception):
    """The state is not as described above, or has gaps, so that it cannot be copied."""


@dataclasses.dataclass(frozen=True)
class _Plane:
    """The keys or the values of one layer."""

    header: bytes  # as it stands before them
    n_bytes: int  # of one position
    n_columns: int  # of transposed ones, else 0


@dataclasses.dataclass(frozen=True)
class _Cache:
    header: bytes  # as it stands before its planes
    planes: tuple[_Plane, ...]


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """What the states of all sequences of a context have in common."""

    magic: int
    n_sequences: int
    caches: tuple[_Cache, ...]

    @property
    def cell_bytes(self) -> int:
        """Of one position."""
        return sum(plane.n_bytes for cache in self.caches for plane in cache.planes)


def layout_of(state: memoryview, n_sequences: int) -> StateLayout:
    """From the state of a sequence that holds something; raises UnknownStateError."""
    return _read(state, n_sequences)[0]


def cells_of(layout: StateLayout, state: memoryview, start: int, end: int) -> Cells:
    """The positions [start, end) out of a state; raises UnknownStateError if it has not all."""
    found, planes = _read(state, layout.n_sequences)
    if found != layout:
        raise UnknownStateError("the state is another one than expected")
    parts = [plane.rows[start - plane.first : end - plane.first] for plane in planes]
    if any(plane.first > start for plane in planes) or any(len(p) != end - start for p in parts):
        raise UnknownStateError("the state does not have all of the positions")
    return np.concatenate([part.reshape(end - start, -1) for part in parts], axis=1)


def state_of(layout: StateLayout, cells: Cells, sequence: int) -> bytes:
    """The state of a sequence that holds these positions, from 0 on; there is at least one."""
    n_cells, at = len(cells), 0
    places = np.empty(n_cells, dtype=_CELL)
    places["position"], places["n_sequences"], places["sequence"] = np.arange(n_cells), 1, sequence
    parts: list[bytes | memoryview] = [_PAIR.pack(layout.magic, sequence)]
    for cache in layout.caches:
        parts += [_COUNT.pack(layout.n_sequences), bytes(_COUNT.size * sequence)]
        parts += [_COUNT.pack(n_cells), places.tobytes(), cache.header]
        for plane in cache.planes:
            rows = cells[:, at : at + plane.n_bytes]
            at += plane.n_bytes
            if plane.n_columns:
                rows = rows.reshape(n_cells, plane.n_columns, -1).transpose(1, 0, 2)
            parts += [plane.header, np.ascontiguousarray(rows).data.cast("B")]
        parts.append(bytes(_COUNT.size * (layout.n_sequences - 1 - sequence)))
    return b"".join(parts)


class _Reader:
    def __init__(self, state: memoryview) -> None:
        self._state = state
        self._at = 0

    @property
    def is_at_end(self) -> bool:
        return self._at == len(self._state)

    def take(self, n_bytes: int) -> memoryview:
        taken = self._state[self._at : self._at + n_bytes]
        if len(taken) != n_bytes:
            raise UnknownStateError("the state ends early")
        self._at += n_bytes
        return taken

    def count(self) -> int:
        return int(_COUNT.unpack(self.take(_COUNT.size))[0])


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What a plane has, in the order of positions."""

    first: int  # position
    rows: npt.NDArray[np.uint8]  # (number of positions, ...)


def _read(state: memoryview, n_sequences: int) -> tuple[StateLayout, list[_Rows]]:
    """The layout, and what is in the planes."""
    reader = _Reader(state)
    magic, _ = _PAIR.unpack(reader.take(_PAIR.size))
    caches, planes = [], list[_Rows]()
    while not reader.is_at_end:
        caches.append(_read_cache(reader, n_sequences, planes))
    return StateLayout(magic, n_sequences, tuple(caches)), planes


def _read_cache(reader: _Reader, n_sequences: int, into: list[_Rows]) -> _Cache:
    if reader.count() != n_sequences:
        raise UnknownStateError("another number of sequences")
    found: list[_Cache] = []
    for _ in range(n_sequences):
        n_cells = reader.count()
        if not n_cells:
            continue
        places = np.frombuffer(reader.take(n_cells * _CELL.itemsize), dtype=_CELL)
        first = int(places["position"][0])
        in_order = (places["position"] == np.arange(first, first + n_cells)).all()
        if not in_order or not (places["n_sequences"] == 1).all():
            raise UnknownStateError("cells are shared, or not in the order of positions")
        found.append(_read_layers(reader, n_cells, first, into))
    if len(found) != 1:
        raise UnknownStateError("not the state of one sequence that holds something")
    return found[0]


def _read_layers(reader: _Reader, n_cells: int, first: int, into: list[_Rows]) -> _Cache:
    header = bytes(reader.take(_PAIR.size))
    are_transposed, n_layer = _PAIR.unpack(header)
    if are_transposed > 1 or not 0 < n_layer <= MODEL_LAYERS_MAX:
        raise UnknownStateError("no number of layers")
    planes = []
    for is_value in (False, True):
        for _ in range(n_layer):
            is_transposed = is_value and bool(are_transposed)
            plane, rows = _read_plane(reader, n_cells, is_transposed=is_transposed)
            planes.append(plane)
            into.append(_Rows(first, rows))
    return _Cache(header, tuple(planes))


def _read_plane(
    reader: _Reader, n_cells: int, *, is_transposed: bool
) -> tuple[_Plane, npt.NDArray[np.uint8]]:
    form = _COLUMNS if is_transposed else _ROWS
    header = bytes(reader.take(form.size))
    _, n_bytes, *widths = form.unpack(header)
    if not is_transposed:
        values = np.frombuffer(reader.take(n_cells * n_bytes), dtype=np.uint8)
        return _Plane(header, n_bytes, 0), values.reshape(n_cells, n_bytes)
    (n_columns,) = widths
    values = np.frombuffer(reader.take(n_cells * n_bytes * n_columns), dtype=np.uint8)
    rows = values.reshape(n_columns, n_cells, n_bytes).transpose(1, 0, 2)
    return _Plane(header, n_bytes * n_columns, n_columns), rows
