"""Hidden states out of llama.cpp's graph, and into it.

llama.cpp asks a callback for each node of its graph whether it wants to see the data.  This one
wants the last layer's output, mostly `l_out-<layer>`; once it has the rows it says false, and
llama.cpp stops the graph there, so that the final norm and the output head are not computed.

Some architectures scale or norm their input, or add positions to it, even if it is hidden states
of an earlier stage.  Then the callback also wants the node behind all that, and puts the hidden
states there.  For a few others it sets numbers of the graph, see `graph_constants`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_cpp import _ggml
from llama_cpp import llama_cpp as api

from shardmesh.engine.base import Hidden
from shardmesh.engine.graph_constants import Factors, FactorSetter
from shardmesh.errors import EngineError

_ggml_get_name = _ggml.libggml.ggml_get_name
_ggml_get_name.argtypes = [ctypes.c_void_p]
_ggml_get_name.restype = ctypes.c_char_p
_ggml_nbytes = _ggml.libggml.ggml_nbytes
_ggml_nbytes.argtypes = [ctypes.c_void_p]
_ggml_nbytes.restype = ctypes.c_size_t
_ggml_backend_tensor_get = _ggml.libggml.ggml_backend_tensor_get
_ggml_backend_tensor_set = _ggml.libggml.ggml_backend_tensor_set
for _function in (_ggml_backend_tensor_get, _ggml_backend_tensor_set):
    _function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    _function.restype = None

_BYTES_PER_NUMBER = 4


class HiddenTap:
    """Collects the rows of `output_node` of one computation after another.

    Without `output_node` it lets the graph run to its end.  `input_node` names the node that gets
    the hidden states of `start`; empty: none.  `factors` are set in each graph.
    """

    def __init__(
        self,
        n_embd: int,
        n_rows_max: int,
        *,
        output_node: str = "",
        input_node: str = "",
        factors: Factors | None = None,
    ) -> None:
        self._factors = None if factors is None else FactorSetter(factors)
        self._output_name = output_node.encode() if output_node else None
        self._input_name = input_node.encode() if input_node else None
        self._rows = np.empty((n_rows_max, n_embd), dtype=np.float32)
        self._n_rows = 0
        self._input: Hidden | None = None
        self._is_input_put = False
        self._error: Exception | None = None
        # llama.cpp keeps only the address: this object must live as long as the context.
        self.callback: Any = api.ggml_backend_sched_eval_callback(self._on_node)

    def start(self, hidden: Sequence[Hidden]) -> None:
        """Forgets the computation before; `hidden`, each (n_rows, n_embd), are the rows put in."""
        self._n_rows = 0
        self._error = None
        self._is_input_put = False
        if self._factors is not None:
            self._factors.start()
        self._input = np.concatenate(hidden, dtype=np.float32) if hidden else None

    def check(self) -> None:
        """Raises EngineError (ours) if the graph did not take or give what it should."""
        if self._error is not None:
            raise EngineError("the hidden states could not be read") from self._error
        if self._input_name is not None and not self._is_input_put:
            raise EngineError("llama.cpp's graph has no place for the hidden states")
        if self._factors is not None:
            self._factors.check()

    def take(self, n_rows: int) -> Hidden:
        """The rows of this computation, (n_rows, n_embd), valid until the next `start`.

        Raises EngineError (ours) if llama.cpp gave others than the expected number.
        """
        self.check()
        if self._n_rows != n_rows:
            raise EngineError(f"llama.cpp gave {self._n_rows} rows of hidden states, not {n_rows}")
        return self._rows[:n_rows]

    def _on_node(self, tensor: int, ask: bool, user_data: int | None) -> bool:
        """Called by llama.cpp; an exception must not pass through its frames."""
        try:
            name = _ggml_get_name(tensor)
            if ask:
                if self._factors is not None:
                    self._factors.on_node(tensor, name, _ggml_get_name)
                return name in (self._output_name, self._input_name)
            if name == self._input_name:
                self._put(tensor)
                return True
            self._copy(tensor)
        except Exception as error:  # noqa: BLE001 - kept, and raised by `check`
            self._error = error
        return False

    def _put(self, tensor: int) -> None:
        if self._input is None or _ggml_nbytes(tensor) != self._input.nbytes:
            raise EngineError("the hidden states do not fit into llama.cpp's graph")
        _ggml_backend_tensor_set(tensor, self._input.ctypes.data, 0, self._input.nbytes)
        self._is_input_put = True

    def _copy(self, tensor: int) -> None:
        """Appends the tensor's rows: it comes once for each part that llama.cpp cuts a batch in."""
        n_bytes = _ggml_nbytes(tensor)
        n_rows = n_bytes // (self._rows.shape[1] * _BYTES_PER_NUMBER)
        target = self._rows[self._n_rows : self._n_rows + n_rows]
        if target.nbytes != n_bytes:
            raise EngineError(f"{n_bytes} bytes of hidden states do not fit")
        _ggml_backend_tensor_get(tensor, target.ctypes.data, 0, n_bytes)
        self._n_rows += n_rows
