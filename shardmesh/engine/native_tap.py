"""The callback of a `HiddenTap` in C, where the package was built with a compiler.

llama.cpp asks it for each node of a graph.  In Python that costs 0.7 us a node, for which the
thread also needs the interpreter's lock: 2.5 % of a token on a CPU with small layers, and more
where layers are quicker.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as api

from shardmesh.engine.ggml import (
    ggml_backend_tensor_get,
    ggml_backend_tensor_set,
    ggml_get_name,
    ggml_nbytes,
)

logger = logging.getLogger(__name__)

_LIBRARY = Path(__file__).with_name("_tap_callback.so")


class _State(ctypes.Structure):
    """`struct tap` of tap_callback.c."""

    _fields_ = (
        ("get_name", ctypes.c_void_p),
        ("n_bytes", ctypes.c_void_p),
        ("get", ctypes.c_void_p),
        ("set", ctypes.c_void_p),
        ("output_name", ctypes.c_char_p),
        ("input_name", ctypes.c_char_p),
        ("output", ctypes.c_void_p),
        ("output_room", ctypes.c_size_t),
        ("output_n_bytes", ctypes.c_size_t),
        ("input", ctypes.c_void_p),
        ("input_n_bytes", ctypes.c_size_t),
        ("input_wanted", ctypes.c_size_t),
    )


class NativeTap:
    """The C function and what it knows; must live as long as the context that it is given to."""

    def __init__(
        self,
        function: Any,
        rows: npt.NDArray[np.float32],
        output_name: bytes | None,
        input_name: bytes | None,
    ) -> None:
        """`rows` (n_rows_max, n_embd) is filled from its beginning."""
        self._rows = rows  # kept: the C function writes to it
        self._input: npt.NDArray[np.float32] | None = None
        self._state = _State(
            get_name=_address(ggml_get_name),
            n_bytes=_address(ggml_nbytes),
            get=_address(ggml_backend_tensor_get),
            set=_address(ggml_backend_tensor_set),
            output_name=output_name,
            input_name=input_name,
            output=rows.ctypes.data,
            output_room=rows.nbytes,
        )
        self.callback: Any = ctypes.cast(function, api.ggml_backend_sched_eval_callback)
        self.user_data = ctypes.addressof(self._state)

    def start(self, hidden: npt.NDArray[np.float32] | None) -> None:
        """Forgets the computation before; `hidden` are the rows to put in."""
        self._input = hidden
        self._state.output_n_bytes = self._state.input_wanted = 0
        self._state.input = None if hidden is None else hidden.ctypes.data
        self._state.input_n_bytes = 0 if hidden is None else hidden.nbytes

    @property
    def n_output_bytes(self) -> int:
        """Bytes that came out; more than `rows` has when there was no room."""
        return int(self._state.output_n_bytes)

    @property
    def n_input_bytes_wanted(self) -> int:
        """Bytes of the node that the input goes to; 0 if the graph has none."""
        return int(self._state.input_wanted)


@cache
def native_callback() -> Any | None:
    """The compiled function; None if the package was built without a compiler."""
    try:
        function = ctypes.CDLL(str(_LIBRARY)).shardmesh_tap
    except OSError:
        logger.info("llama.cpp is asked for hidden states in Python: nothing was compiled")
        return None
    return function


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value
