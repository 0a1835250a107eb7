"""Hidden states keep their bits in float32, and their shape and size in float16."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shardmesh.errors import ProtocolError
from shardmesh.wire.hidden_states import WireType, body_to_hidden, hidden_to_body, n_body_bytes

FLOAT16_MAX = 65504.0
SHAPES = arrays.array_shapes(min_dims=2, max_dims=2, max_side=8)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(arrays.arrays(np.float32, SHAPES, elements=FINITE))
def test_float32_keeps_every_bit(hidden: np.ndarray) -> None:
    body, wire = hidden_to_body(hidden)
    assert wire == "f32"
    assert len(body) == n_body_bytes(*hidden.shape, wire)
    assert body_to_hidden(body, *hidden.shape, wire).tobytes() == hidden.tobytes()


@given(arrays.arrays(np.float32, SHAPES, elements=FINITE))
def test_float16_where_all_fits_and_float32_where_not(hidden: np.ndarray) -> None:
    body, wire = hidden_to_body(hidden, "f16")
    assert len(body) == n_body_bytes(*hidden.shape, wire)
    found = body_to_hidden(body, *hidden.shape, wire)
    assert found.dtype == np.float32
    if np.abs(hidden).max() <= FLOAT16_MAX:
        assert wire == "f16"
        assert found.tobytes() == hidden.astype(np.float16).astype(np.float32).tobytes()
    elif wire == "f32":
        assert found.tobytes() == hidden.tobytes()
    else:  # just above the largest number of float16, and rounded down to it
        assert np.abs(found).max() == FLOAT16_MAX


def test_columns_of_a_wider_array() -> None:
    hidden = np.arange(12, dtype=np.float32).reshape(2, 6)[:, ::2]
    for wire in ("f32", "f16"):
        body, _ = hidden_to_body(hidden, wire)
        assert body_to_hidden(body, 2, 3, wire).tolist() == hidden.tolist()


@given(arrays.arrays(np.float32, SHAPES, elements=st.floats(width=32)))
def test_what_is_finite_and_nothing_else_is_taken(hidden: np.ndarray) -> None:
    """Huge numbers and strange kinds of what is none are close to each other in their bits."""
    body = memoryview(hidden.tobytes())
    if np.isfinite(hidden).all():
        assert body_to_hidden(body, *hidden.shape, "f32").tobytes() == hidden.tobytes()
    else:
        with pytest.raises(ProtocolError):
            body_to_hidden(body, *hidden.shape, "f32")


@pytest.mark.parametrize("n_numbers", [2, 8192, 8193])
def test_one_that_is_not_finite_is_found_anywhere(n_numbers: int) -> None:
    for bits in (0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x7FC00000):
        for place in (0, n_numbers - 1):
            words = np.full(n_numbers, 0x7F7FFFFF, dtype=np.uint32)
            assert body_to_hidden(memoryview(words.tobytes()), 1, n_numbers, "f32").size
            words[place] = bits
            with pytest.raises(ProtocolError):
                body_to_hidden(memoryview(words.tobytes()), 1, n_numbers, "f32")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("wire", "dtype"), [("f32", "<f4"), ("f16", "<f2")])
def test_what_is_not_finite_is_refused(value: float, wire: WireType, dtype: str) -> None:
    body = memoryview(np.array([0, value], dtype=dtype).tobytes())
    with pytest.raises(ProtocolError) as caught:
        body_to_hidden(body, 1, 2, wire)
    assert caught.value.code == "NOT_FINITE"
