"""The KV of sequences out of a llama.cpp context and into another one, see `engine.cells`.

llama.cpp gives the state of a whole sequence only; what is not wanted of it costs a copy in memory.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as api

from shardmesh.engine.base import Cells
from shardmesh.engine.cells import StateLayout, UnknownStateError, cells_of, layout_of, state_of
from shardmesh.errors import EngineError
from shardmesh.wire.limits import COPIED_STATE_BYTES_MAX, KV_COPY_BYTES_MAX

_BYTES = ctypes.POINTER(ctypes.c_uint8)


class SequenceStates:
    """Reads and writes the KV of one context's sequences."""

    def __init__(self, context: Any, n_sequences: int) -> None:
        """`context` must live as long, and have a cache for each sequence."""
        self._context = context
        self._n_sequences = n_sequences
        self._layout: StateLayout | None = None
        self._buffer = np.empty(0, dtype=np.uint8)

    def learn(self, sequence: int, n_held: int) -> int:
        """The bytes of one position's KV, from a sequence that holds some; 0: it cannot be copied.

        It can if its positions, taken apart and put together again, are the very state.
        """
        state = self._state(sequence)
        try:
            layout = layout_of(state, self._n_sequences)
            cells = cells_of(layout, state, 0, n_held)
        except UnknownStateError:
            return 0
        is_all = state_of(layout, cells, sequence) == state
        self._layout = layout if is_all and layout.cell_bytes <= KV_COPY_BYTES_MAX else None
        return layout.cell_bytes if self._layout is not None else 0

    def read(self, sequence: int, start: int, end: int) -> Cells:
        """The positions [start, end); raises EngineError (ours) if they cannot be had."""
        try:
            return cells_of(self._known_layout(), self._state(sequence), start, end)
        except UnknownStateError as error:
            raise EngineError(f"the KV of a sequence cannot be copied: {error}") from None

    def write(self, sequence: int, cells: Cells) -> None:
        """Replaces what the sequence holds; raises EngineError (ours), after which it is empty."""
        state = np.frombuffer(state_of(self._known_layout(), cells, sequence), dtype=np.uint8)
        pointer = state.ctypes.data_as(_BYTES)
        n_read = api.llama_state_seq_set_data(self._context, pointer, len(state), sequence)
        if n_read != len(state):
            api.llama_memory_seq_rm(api.llama_get_memory(self._context), sequence, -1, -1)
            raise EngineError("llama.cpp did not take the KV of a sequence")

    def _known_layout(self) -> StateLayout:
        if self._layout is None:
            raise EngineError("the KV of this model cannot be copied")
        return self._layout

    def _state(self, sequence: int) -> memoryview:
        """The state as llama.cpp gives it, valid until the next one is asked for."""
        n_bytes = int(api.llama_state_seq_get_size(self._context, sequence))
        if n_bytes > COPIED_STATE_BYTES_MAX:
            raise EngineError(f"a sequence's state has {n_bytes} bytes, which is too much to copy")
        if n_bytes > len(self._buffer):
            # Texts grow: with a new buffer each time, its first use would cost more than the copy.
            self._buffer = np.empty(2 * n_bytes, dtype=np.uint8)
        pointer = self._buffer.ctypes.data_as(_BYTES)
        if api.llama_state_seq_get_data(self._context, pointer, n_bytes, sequence) != n_bytes:
            raise EngineError("llama.cpp did not give the state of a sequence")
        return self._buffer.data[:n_bytes]
