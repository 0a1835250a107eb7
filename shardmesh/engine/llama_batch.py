"""llama.cpp's `llama_batch` over memory that numpy owns, filled without a loop over rows."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as api

from shardmesh.engine.base import MicroBatch

_MROPE_SECTIONS = 4


class LlamaBatch:
    """Room for `n_rows_max` rows of tokens, or of hidden states if `n_embd_input` is not 0.

    Hidden states without room for them are fed as tokens 0: a `HiddenTap` puts them in.

    `has_sections`: the architecture rotates by several position sections (M-RoPE); llama.cpp
    fills these in for tokens, but wants all of them with hidden states.
    """

    def __init__(self, n_rows_max: int, n_embd_input: int, *, has_sections: bool) -> None:
        self._n_sections = _MROPE_SECTIONS if n_embd_input and has_sections else 1
        self._tokens = np.zeros(n_rows_max, dtype=np.int32)
        # Zero beyond n_embd: some architectures have room for further inputs in a row.
        self._hidden = np.zeros((n_rows_max, n_embd_input), dtype=np.float32)
        self._positions = np.zeros(n_rows_max * self._n_sections, dtype=np.int32)
        self._sequences = np.zeros(n_rows_max, dtype=np.int32)
        self._n_sequences = np.ones(n_rows_max, dtype=np.int32)
        first = self._sequences.ctypes.data
        step = self._sequences.itemsize
        self._sequence_pointers = np.arange(
            first, first + n_rows_max * step, step, dtype=np.uintp
        )  # each row belongs to one sequence, so that the pointers never change
        self._is_output = np.zeros(n_rows_max, dtype=np.int8)
        self._struct = self._point_to_rows()

    def fill(self, micros: Sequence[MicroBatch], *, output_all: bool) -> Any:
        """The struct for `llama_decode`, valid until the next fill.

        `output_all`: every row is an output; else those that something is wanted of.
        """
        first = 0
        for micro in micros:
            n_tokens = micro.n_tokens
            if n_tokens == 1:
                self._set_row(first, micro, is_output=output_all)
            else:
                self._set_rows(first, first + n_tokens, micro, output_all=output_all)
            first += n_tokens
        self._fill_sections(first)
        self._struct.n_tokens = first
        return self._struct

    def _set_row(self, row: int, micro: MicroBatch, *, is_output: bool) -> None:
        """A single token, as most are: setting a number takes a fifth of setting a slice."""
        if micro.tokens is not None:
            self._tokens[row] = micro.tokens[0]
        elif micro.hidden is not None and self._hidden.size:
            self._hidden[row, : micro.hidden.shape[1]] = micro.hidden[0]
        self._sequences[row] = micro.sequence
        is_wanted = micro.sample or micro.want_logits or micro.scored
        self._is_output[row] = is_output or bool(is_wanted)
        self._positions[row] = micro.position

    def _set_rows(self, first: int, end: int, micro: MicroBatch, *, output_all: bool) -> None:
        if micro.tokens is not None:
            self._tokens[first:end] = micro.tokens
        elif micro.hidden is not None and self._hidden.size:
            self._hidden[first:end, : micro.hidden.shape[1]] = micro.hidden
        self._sequences[first:end] = micro.sequence
        self._is_output[first:end] = output_all
        self._is_output[first : first + len(micro.scored)] = True
        if micro.sample or micro.want_logits:
            self._is_output[end - 1] = True
        last = micro.position + micro.n_tokens
        self._positions[first:end] = np.arange(micro.position, last, dtype=np.int32)

    def _fill_sections(self, n_rows: int) -> None:
        """Section by section, as llama.cpp lays them out for text: p, p, p and 0."""
        for section in range(1, self._n_sections):
            target = self._positions[section * n_rows : (section + 1) * n_rows]
            target[:] = 0 if section == _MROPE_SECTIONS - 1 else self._positions[:n_rows]

    def _point_to_rows(self) -> Any:
        """The struct over this memory, which stays where it is: made once."""
        struct = api.llama_batch()
        if self._hidden.shape[1] > 0:
            struct.embd = _pointer(self._hidden, ctypes.c_float)
        else:
            struct.token = _pointer(self._tokens, ctypes.c_int32)
        struct.pos = _pointer(self._positions, ctypes.c_int32)
        struct.n_seq_id = _pointer(self._n_sequences, ctypes.c_int32)
        struct.seq_id = _pointer(self._sequence_pointers, ctypes.POINTER(ctypes.c_int32))
        struct.logits = _pointer(self._is_output, ctypes.c_int8)
        return struct


def _pointer(array: npt.NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))
