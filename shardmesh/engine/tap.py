"""Hidden states out of llama.cpp's graph, and into it.

llama.cpp asks a callback for each node of its graph whether it wants to see the data.  This one
wants the last layer's output, mostly `l_out-<layer>`; once it has the rows it says false, and
llama.cpp stops the graph there, so that the final norm and the output head are not computed.

Some architectures scale or norm their input, or add positions to it, even if it is hidden states
of an earlier stage.  Then the callback also wants the node behind all that, and puts the hidden
states there.  For a few others it sets numbers of the graph, see `graph_constants`.

The callback is a small C function where one was compiled (`native_tap`), else the method below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as api

from shardmesh.engine.base import Hidden
from shardmesh.engine.ggml import (
    ggml_backend_tensor_get,
    ggml_backend_tensor_set,
    ggml_get_name,
    ggml_nbytes,
)
from shardmesh.engine.graph_constants import Factors, FactorSetter
from shardmesh.engine.native_tap import NativeTap, native_callback
from shardmesh.errors import EngineError


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
        self._n_bytes_per_row = n_embd * self._rows.itemsize
        self._n_rows = 0
        self._input: Hidden | None = None
        self._is_input_put = False
        self._error: Exception | None = None
        function = native_callback() if factors is None else None
        self._native: NativeTap | None = None
        # llama.cpp keeps only addresses: this object must live as long as the context.
        self.callback: Any
        self.user_data: int | None = None
        if function is None:
            self.callback = api.ggml_backend_sched_eval_callback(self._on_node)
        else:
            self._native = NativeTap(function, self._rows, self._output_name, self._input_name)
            self.callback, self.user_data = self._native.callback, self._native.user_data

    def start(self, hidden: Sequence[Hidden]) -> None:
        """Forgets the computation before; `hidden`, each (n_rows, n_embd), are the rows put in."""
        self._n_rows = 0
        self._error = None
        self._is_input_put = False
        if self._factors is not None:
            self._factors.start()
        is_put_in = self._input_name is not None and hidden
        self._input = np.concatenate(hidden, dtype=np.float32) if is_put_in else None
        if self._native is not None:
            self._native.start(self._input)

    def check(self) -> None:
        """Raises EngineError (ours) if the graph did not take or give what it should."""
        if self._native is not None:
            self._take_over(self._native)
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
            name = ggml_get_name(tensor)
            if ask:
                if self._factors is not None:
                    self._factors.on_node(tensor, name, ggml_get_name)
                return name in (self._output_name, self._input_name)
            if name == self._input_name:
                self._put(tensor)
                return True
            self._copy(tensor)
        except Exception as error:  # noqa: BLE001 - kept, and raised by `check`
            self._error = error
        return False

    def _take_over(self, native: NativeTap) -> None:
        """What the C function saw, as if the method below had."""
        self._n_rows = native.n_output_bytes // self._n_bytes_per_row
        self._is_input_put = native.n_input_bytes_wanted > 0
        if self._is_input_put:
            self._check_input(native.n_input_bytes_wanted)

    def _check_input(self, n_bytes: int) -> None:
        if self._input is None or self._input.nbytes != n_bytes:
            raise EngineError("the hidden states do not fit into llama.cpp's graph")

    def _put(self, tensor: int) -> None:
        self._check_input(ggml_nbytes(tensor))
        if self._input is None:
            return
        ggml_backend_tensor_set(tensor, self._input.ctypes.data, 0, self._input.nbytes)
        self._is_input_put = True

    def _copy(self, tensor: int) -> None:
        """Appends the tensor's rows: it comes once for each part that llama.cpp cuts a batch in."""
        n_bytes = ggml_nbytes(tensor)
        n_rows = n_bytes // self._n_bytes_per_row
        target = self._rows[self._n_rows : self._n_rows + n_rows]
        if target.nbytes != n_bytes:
            raise EngineError(f"{n_bytes} bytes of hidden states do not fit")
        ggml_backend_tensor_get(tensor, target.ctypes.data, 0, n_bytes)
        self._n_rows += n_rows
