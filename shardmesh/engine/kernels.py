"""Shardmesh's own kernel for Q8_0 weights (q8_matmul.c): the same bits as ggml's, sooner.

Where `kernel_library.py` could load it, it computes if its products are those of ggml when an
engine is loaded.  Otherwise ggml does, as without it.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shardmesh.engine.kernel_library import preload

logger = logging.getLogger(__name__)

Q8_0: Final = 8
"""ggml's number of the type."""

_BLOCK: Final = np.dtype([("scale", np.float16), ("quants", np.int8, 32)])
_SEED = 8

_CHECKED: Final = (
    (19, 1, 5),
    (19, 2, 40),
    (7, 3, 400),
    (5, 8, 500),
    (5, 17, 33),
    (3, 9, 3000),
)
"""Weights' rows, activations' rows, blocks of a row: one for each way through q8_matmul.c."""


def use_own_kernels(wanted: bool) -> bool:
    """Whether products of Q8_0 weights are computed by Shardmesh from now on, in this process."""
    library = preload()
    if library is None:
        return False
    original = _function_of_ggml()
    is_used = wanted and original is not None and _gives_the_same_bits(library)
    library.shardmesh_q8_use(is_used, original)
    return is_used


def n_products() -> int:
    """Products of matrices that Shardmesh's kernel computed in this process."""
    library = preload()
    return 0 if library is None else int(library.shardmesh_q8_count())


def _function_of_ggml() -> int | None:
    """The address of what q8_matmul.c stands in for; None if this ggml was built without it."""
    from llama_cpp import _ggml

    try:
        function = _ggml.libggml.llamafile_sgemm
    except AttributeError:
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


class _Traits(ctypes.Structure):
    """`struct ggml_type_traits_cpu` of ggml-cpu.h."""

    _fields_ = (
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("n_rows", ctypes.c_int64),
    )


@cache
def _gives_the_same_bits(library: Any) -> bool:
    """Compares products of made-up numbers with those of ggml: some ten milliseconds, once."""
    generator = np.random.default_rng(_SEED)
    for n_weights, n_activations, n_blocks in _CHECKED:
        weights = _random_blocks(generator, n_weights, n_blocks)
        activations = _random_blocks(generator, n_activations, n_blocks)
        own = own_products(library, weights, activations)
        if own.tobytes() != ggml_products(weights, activations).tobytes():
            logger.warning("Shardmesh's kernel differs from ggml's on this CPU: it is not used")
            return False
    return True


def own_products(
    library: Any, weights: npt.NDArray[Any], activations: npt.NDArray[Any], n_threads: int = 1
) -> npt.NDArray[np.float32]:
    """(n, m) of weights (m, k) and activations (n, k), arrays of blocks; NaN if it cannot be done.

    Each part of `n_threads` is computed, one after the other.
    """
    n, m = len(activations), len(weights)
    products = np.full((n, m), np.nan, dtype=np.float32)
    int64 = ctypes.c_int64
    for thread in range(n_threads):
        library.shardmesh_q8_multiply(
            (ctypes.c_int * 2)(thread, n_threads),
            *(int64(m), int64(n), int64(weights.shape[1])),
            *(ctypes.c_void_p(weights.ctypes.data), int64(weights.shape[1])),
            *(ctypes.c_void_p(activations.ctypes.data), int64(activations.shape[1])),
            *(ctypes.c_void_p(products.ctypes.data), int64(m)),
        )
    return products


def ggml_products(
    weights: npt.NDArray[Any], activations: npt.NDArray[Any]
) -> npt.NDArray[np.float32]:
    """The same by ggml's own product of two rows."""
    from llama_cpp import _ggml

    _ggml.libggml.ggml_cpu_init()  # fills its table of scales
    traits = _ggml.libggml.ggml_get_type_traits_cpu
    traits.restype = ctypes.POINTER(_Traits)
    number, size, place = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
    arguments = (number, place, size, place, size, place, size, number)
    vec_dot = ctypes.CFUNCTYPE(None, *arguments)(traits(Q8_0).contents.vec_dot)
    products = np.empty((len(activations), len(weights)), dtype=np.float32)
    n_values = 32 * weights.shape[1]
    for i, activation in enumerate(activations):
        for j, weight in enumerate(weights):
            result = products[i, j:].ctypes.data
            vec_dot(n_values, result, 0, weight.ctypes.data, 0, activation.ctypes.data, 0, 1)
    return products


def _random_blocks(generator: np.random.Generator, n_rows: int, n_blocks: int) -> npt.NDArray[Any]:
    blocks = np.empty((n_rows, n_blocks), dtype=_BLOCK)
    blocks["scale"] = generator.standard_normal((n_rows, n_blocks)).astype(np.float16)
    blocks["quants"] = generator.integers(-127, 128, (n_rows, n_blocks, 32))
    return blocks
