"""Shardmesh's own kernels (q8_matmul.c, f16_matmul.c): the same bits as ggml's, sooner.

Where `kernel_library.py` could load them, each computes if its products are those of ggml when an
engine is loaded.  Otherwise ggml does, as without them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shardmesh.engine.kernel_library import preload

logger = logging.getLogger(__name__)

F16: Final = 1
Q8_0: Final = 8
"""ggml's numbers of the types."""

F16_LANES: Final = (16, 8)
"""In which ggml adds up a row of half precision, by what it was built for: AVX-512, or less."""

_BLOCK: Final = np.dtype([("scale", np.float16), ("quants", np.int8, 32)])
_SEED = 8

_Q8_CHECKED: Final = (
    (19, 1, 5),
    (19, 2, 40),
    (7, 3, 400),
    (5, 8, 500),
    (5, 17, 33),
    (3, 9, 3000),
)
"""Weights' rows, activations' rows, blocks of a row: one for each way through q8_matmul.c."""

_F16_CHECKED: Final = ((64, 64), (37, 128), (5, 2048))
"""Rows, values of a row."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """Products of matrices that Shardmesh's kernels computed in this process."""

    q8: int
    f16: int


def use_own_kernels(wanted: bool) -> bool:
    """Whether Shardmesh computes any kind of products from now on, in this process."""
    library = preload()
    if library is None:
        return False
    original = _function_of_ggml()
    is_possible = wanted and original is not None
    q8 = is_possible and _q8_is_equal(library)
    f16_lanes = _equal_f16_lanes(library) if is_possible else 0
    library.shardmesh_use(q8, f16_lanes, original)
    return q8 or f16_lanes > 0


def count_products() -> Counts:
    """See `Counts`."""
    library = preload()
    q8, f16 = ctypes.c_uint64(), ctypes.c_uint64()
    if library is not None:
        library.shardmesh_count(ctypes.byref(q8), ctypes.byref(f16))
    return Counts(q8.value, f16.value)


def _function_of_ggml() -> int | None:
    """The address of what matmul.c stands in for; None if this ggml was built without it."""
    from llama_cpp import _ggml

    try:
        function = _ggml.libggml.llamafile_sgemm
    except AttributeError:
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


@cache
def _q8_is_equal(library: Any) -> bool:
    """Compares products of made-up numbers with those of ggml: some ten milliseconds, once."""
    generator = np.random.default_rng(_SEED)
    for n_weights, n_activations, n_blocks in _Q8_CHECKED:
        weights = _random_blocks(generator, n_weights, n_blocks)
        activations = _random_blocks(generator, n_activations, n_blocks)
        own = own_q8_products(library, weights, activations)
        if own.tobytes() != ggml_q8_products(weights, activations).tobytes():
            logger.warning("the kernel for Q8_0 differs from ggml's on this CPU: it is not used")
            return False
    return True


@cache
def _equal_f16_lanes(library: Any) -> int:
    """The way of adding up that gives the bits of ggml; 0 if none does."""
    generator = np.random.default_rng(_SEED)
    cases = [
        (_random_halves(generator, n_rows, n_values), _random_halves(generator, 1, n_values)[0])
        for n_rows, n_values in _F16_CHECKED
    ]
    expected = [ggml_f16_products(rows, row).tobytes() for rows, row in cases]
    for lanes in F16_LANES:
        if [own_f16_products(library, lanes, *case).tobytes() for case in cases] == expected:
            return lanes
    logger.warning("the kernel for F16 differs from ggml's on this CPU: it is not used")
    return 0


def own_q8_products(
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


def own_f16_products(
    library: Any,
    lanes: int,
    rows: npt.NDArray[np.float16],
    row: npt.NDArray[np.float16],
    n_threads: int = 1,
) -> npt.NDArray[np.float32]:
    """(m,) of rows (m, k), which may be a part of a wider array, and one row (k,); see above."""
    products = np.full(len(rows), np.nan, dtype=np.float32)
    int64 = ctypes.c_int64
    for thread in range(n_threads):
        library.shardmesh_f16_multiply(
            ctypes.c_int(lanes),
            (ctypes.c_int * 2)(thread, n_threads),
            *(int64(len(rows)), int64(len(row))),
            *(ctypes.c_void_p(rows.ctypes.data), int64(rows.strides[0] // rows.itemsize)),
            *(ctypes.c_void_p(row.ctypes.data), ctypes.c_void_p(products.ctypes.data)),
        )
    return products


def ggml_q8_products(
    weights: npt.NDArray[Any], activations: npt.NDArray[Any]
) -> npt.NDArray[np.float32]:
    """The same by ggml's own product of two rows."""
    return np.stack([_ggml_products(Q8_0, weights, row, 32 * len(row)) for row in activations])


def ggml_f16_products(
    rows: npt.NDArray[np.float16], row: npt.NDArray[np.float16]
) -> npt.NDArray[np.float32]:
    """The same by ggml's own product of two rows."""
    return _ggml_products(F16, rows, row, len(row))


def _ggml_products(
    number: int, rows: npt.NDArray[Any], row: npt.NDArray[Any], n_values: int
) -> npt.NDArray[np.float32]:
    products = np.empty(len(rows), dtype=np.float32)
    multiply = _ggml_product(number)
    for i, other in enumerate(rows):
        result = products[i:].ctypes.data
        multiply(n_values, result, 0, other.ctypes.data, 0, row.ctypes.data, 0, 1)
    return products


class _Traits(ctypes.Structure):
    """`struct ggml_type_traits_cpu` of ggml-cpu.h."""

    _fields_ = (
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("n_rows", ctypes.c_int64),
    )


def _ggml_product(type_number: int) -> Callable[..., None]:
    """ggml's function for the product of two rows of a type."""
    from llama_cpp import _ggml

    _ggml.libggml.ggml_cpu_init()  # fills its table of half precision
    traits = _ggml.libggml.ggml_get_type_traits_cpu
    traits.restype = ctypes.POINTER(_Traits)
    number, size, place = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
    arguments = (number, place, size, place, size, place, size, number)
    product: Callable[..., None] = ctypes.CFUNCTYPE(None, *arguments)(
        traits(type_number).contents.vec_dot
    )
    return product


def _random_blocks(generator: np.random.Generator, n_rows: int, n_blocks: int) -> npt.NDArray[Any]:
    blocks = np.empty((n_rows, n_blocks), dtype=_BLOCK)
    blocks["scale"] = generator.standard_normal((n_rows, n_blocks)).astype(np.float16)
    blocks["quants"] = generator.integers(-127, 128, (n_rows, n_blocks, 32))
    return blocks


def _random_halves(
    generator: np.random.Generator, n_rows: int, n_values: int
) -> npt.NDArray[np.float16]:
    return generator.standard_normal((n_rows, n_values)).astype(np.float16)
