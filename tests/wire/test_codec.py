"""CBOR and JSON: the one encoding of a value goes round, everything else is a ProtocolError."""

from __future__ import annotations

import tracemalloc
from typing import Annotated, Any

import cbor2
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmesh.errors import ProtocolError
from shardmesh.wire.codec import decode_cbor, decode_json, encode_cbor, encode_json
from shardmesh.wire.limits import NESTING_MAX


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    x: int
    name: Annotated[str, msgspec.Meta(max_length=8)] = ""


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
        ),
        max_leaves=12,
    )


@given(nested(scalars | st.binary(max_size=20)))
def test_cbor_goes_round_and_has_one_encoding(value: Any) -> None:
    data = encode_cbor(value)
    assert decode_cbor(data, Any) == value
    assert encode_cbor(decode_cbor(data, Any)) == data


@given(nested(scalars))
def test_json_goes_round(value: Any) -> None:
    assert decode_json(encode_json(value), Any) == value


@given(st.binary(max_size=64))
def test_garbage_is_a_protocol_error_or_the_one_encoding_of_its_value(data: bytes) -> None:
    try:
        value = decode_cbor(data, Any)
    except ProtocolError:
        pass
    else:
        assert encode_cbor(value) == data
    try:
        value = decode_json(data, Any)
    except ProtocolError:
        pass
    else:
        assert decode_json(encode_json(value), Any) == value


@given(nested(scalars), st.data())
def test_what_is_cut_off_or_longer_is_refused(value: Any, data: st.DataObject) -> None:
    whole = encode_cbor(value)
    with pytest.raises(ProtocolError):
        decode_cbor(whole[: data.draw(st.integers(0, len(whole) - 1))], Any)
    with pytest.raises(ProtocolError):
        decode_cbor(whole + b"\x00", Any)
    with pytest.raises(ProtocolError):
        decode_json(encode_json(value) + b" 1", Any)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("a2 61 61 00 61 61 01", "the same key twice"),
        ("a2 61 62 00 61 61 01", "keys out of order"),
        ("18 00", "0 in two bytes"),
        ("1a 00 00 00 ff", "255 in five bytes"),
        ("58 01 61", "a length in two bytes"),
        ("fb 00 00 00 00 00 00 00 00", "0.0 in nine bytes"),
        ("5f 41 61 ff", "a string of indefinite length"),
        ("9f ff", "an array of indefinite length"),
        ("bf ff", "a map of indefinite length"),
        ("ff", "a break alone"),
        ("f9 7e 00", "NaN"),
        ("f9 7c 00", "infinity"),
        ("f9 fc 00", "minus infinity"),
        ("81 f9 7e 00", "NaN inside"),
        ("a1 61 61 f9 7e 00", "NaN inside a map"),
        ("f7", "undefined"),
        ("f0", "a simple value"),
        ("c1 1a 51 4b 67 b0", "tag 1, a date"),
        ("c2 49 01 00 00 00 00 00 00 00 00", "tag 2, a big number"),
        ("c4 82 21 19 6a b3", "tag 4, a decimal fraction"),
        ("d8 1c 80", "tag 28, something shared"),
        ("d8 1d 00", "tag 29, a reference"),
        ("d8 23 61 6f", "tag 35, a regular expression"),
        ("d8 25 50" + "00" * 16, "tag 37, a UUID"),
        ("d9 01 02 81 61 61", "tag 258, a set"),
        ("d9 d9 f7 00", "tag 55799, CBOR itself"),
        ("d9 ff fe 00", "a tag that nobody knows"),
        ("a1 01 02", "a number as a key"),
        ("a1 f9 7e 00 00", "NaN as a key"),
        ("a1 82 01 02 00", "an array as a key"),
        ("62 c3 28", "text that is no UTF-8"),
        ("63 ed a0 80", "half of a surrogate pair"),
        ("1c", "a reserved length"),
        ("", "nothing"),
    ],
)
def test_cbor_that_a_lenient_decoder_would_take_is_refused(data: str, why: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_cbor(bytes.fromhex(data), Any)
    assert caught.value.code == "BAD_CBOR", why


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1,"a":2}',
        b'{"b":{"a":1,"a":1}}',
        b"NaN",
        b"[-Infinity]",
        b"1e999",
        b"[1,]",
        b"'a'",
        b"\xef\xbb\xbf1",
        b'"\xff"',
        rb'"\ud800"',
        rb'{"\udfff":1}',
        b"1" * 5000,
        b"1 2",
        b"",
    ],
)
def test_json_that_a_lenient_parser_would_take_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_json(data, Any)
    assert caught.value.code == "BAD_JSON"


def test_a_surrogate_pair_in_json_is_one_character() -> None:
    assert decode_json(rb'"\ud83d\ude00"', str) == "\U0001f600"


@pytest.mark.parametrize("n", [NESTING_MAX + 1, 100_000])
def test_what_is_nested_too_deep_is_refused(n: int) -> None:
    for data in (b"\x81" * n + b"\x00", b"\xa1\x61a" * n + b"\x00"):
        with pytest.raises(ProtocolError):
            decode_cbor(data, Any)
    for text in (b"[" * n + b"]" * n, b'{"a":' * n + b"1" + b"}" * n, b"[" * n):
        with pytest.raises(ProtocolError):
            decode_json(text, Any)


def test_the_deepest_allowed_nesting_is_read() -> None:
    value: Any = 0
    for _ in range(NESTING_MAX):
        value = [value]
    assert decode_cbor(encode_cbor(value), Any) == value
    assert decode_json(encode_json(value), Any) == value


def test_floods_in_json_cost_the_same_as_any_text() -> None:
    """Each of these took a step of Python for each byte, or would overflow a narrow counter."""
    for text in (b"[]" * 100_000, b'"' * 100_000, b'["' + rb"\"" * 100_000, b"]" * 100_000):
        with pytest.raises(ProtocolError) as caught:
            decode_json(text, Any)
        assert caught.value.code == "BAD_JSON"
    assert decode_json(b"[" + b"[]," * 100_000 + b"0]", list[Any])[-1] == 0


@given(st.lists(st.text(alphabet='"\\[]{}a', max_size=8), max_size=4), st.integers(0, 4))
def test_only_what_stands_outside_of_strings_counts_as_nesting(texts: list[str], n: int) -> None:
    """Whatever the strings hold: one level more than allowed is refused, the last one is not."""
    value: Any = texts
    for _ in range(NESTING_MAX - 1):
        value = {texts[0] if texts else "": value} if n % 2 else [value]
    assert decode_json(encode_json(value), Any) == value
    with pytest.raises(ProtocolError, match="nested"):
        decode_json(encode_json([value]), Any)


def test_brackets_in_a_json_string_are_no_nesting() -> None:
    text = '"' + "[" * 100 + "\\"
    assert decode_json(encode_json(text), str) == text


@pytest.mark.parametrize(
    "head", ["5a ffffffff", "7a ffffffff", "9a ffffffff", "ba ffffffff", "9b 0fffffffffffffff"]
)
def test_a_length_that_is_only_claimed_takes_no_memory(head: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode_cbor(bytes.fromhex(head) + b"\x00\x00", Any)
        assert tracemalloc.get_traced_memory()[1] < 1024 * 1024
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "value",
    [
        {"x": 1, "name": "n", "z": 0},
        {"name": "n"},
        {"x": "1"},
        {"x": 1.5},
        {"x": True},
        {"x": 1, "name": "longer than eight"},
        [1, "n"],
        None,
    ],
)
def test_values_that_are_no_such_message_are_refused(value: Any) -> None:
    with pytest.raises(ProtocolError):
        decode_json(encode_json(value), Point)
    with pytest.raises(ProtocolError):
        decode_cbor(cbor2.dumps(value, canonical=True), Point)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
def test_numbers_that_are_not_finite_are_not_sent_either(value: Any) -> None:
    with pytest.raises(ProtocolError):
        encode_cbor(value)


def test_an_error_does_not_repeat_at_length_what_came() -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_json(encode_json({"x": 1, "y" * 10_000: 1}), Point)
    assert len(str(caught.value)) < 300
