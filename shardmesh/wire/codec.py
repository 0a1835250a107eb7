"""Deterministic CBOR and strict JSON, and from there to typed messages.

Both decoders refuse what a lenient one would accept: duplicate keys, NaN and infinities,
nesting beyond `NESTING_MAX`, anything behind the end, unknown fields, text that is no UTF-8.  CBOR
has no tags, `undefined` or other simple values either, and must be the one deterministic encoding
of its value (RFC 8949 section 4.2.1), so that a signature over the bytes is a signature over the
value.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import operator
from array import array
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import cbor2
import msgspec

from shardmesh.errors import ProtocolError
from shardmesh.wire.limits import NESTING_MAX

T = TypeVar("T")
Tagged = TypeVar("Tagged", bound=msgspec.Struct)


class _NoTags(dict[int, Any]):
    """Decoders by tag for cbor2: none, not even its own, one of which compiles regexes."""

    def __missing__(self, tag: int) -> Any:
        raise ValueError(f"tag {tag}")


_NO_TAGS = _NoTags()


def encode_cbor(message: object) -> bytes:
    """The deterministic CBOR of a message (a msgspec Struct or plain values).

    Raises ProtocolError for a number that the other side would refuse.
    """
    value = msgspec.to_builtins(message, builtin_types=(bytes,))
    _check_plain(value)
    return cbor2.dumps(value, canonical=True)


def decode_cbor(data: bytes | memoryview, kind: type[T]) -> T:
    """The message of type `kind` in `data`.

    Raises ProtocolError (theirs) if the bytes are no message of that kind.
    """
    return convert(_decode_plain(data), kind)


def encode_flat(message: msgspec.Struct) -> bytes:
    """The same bytes as `encode_cbor`, in half the time, for a message of a flat kind.

    Flat is a kind whose fields are whole numbers, truth values, bytes, texts, and arrays of these.
    """
    keys, values_of = _in_key_order(type(message))
    value = msgspec.to_builtins(message, builtin_types=(bytes,))
    return cbor2.dumps(dict(zip(keys, values_of(value), strict=True)))


def decode_tagged(
    data: bytes | memoryview, kinds: Mapping[str, type[Tagged]], flat: Collection[type[Tagged]] = ()
) -> Tagged:
    """The message in `data` of the kind that its `type` names; in `flat` are those that are flat.

    Much faster than `decode_cbor` with a union.  Raises ProtocolError (theirs) if the bytes are no
    message of these kinds.
    """
    raw = bytes(data)
    value = _load(raw)
    tag = value.get("type") if isinstance(value, dict) else None
    kind = kinds.get(tag) if isinstance(tag, str) else None
    if kind is None:
        raise ProtocolError("message refused: its type is unknown")
    if kind in flat:  # the keys' order is all that sorting would change, and no number has a point
        _check_same(raw, value, is_sorted=tuple(value) == _key_order(kind))
    else:
        _check_same(raw, value)
        _check_plain(value)
    return convert(value, kind)


@functools.cache
def _key_order(kind: type[msgspec.Struct]) -> tuple[str, ...]:
    """The keys of a tagged kind as deterministic CBOR has them: shorter ones first."""
    tag = kind.__struct_config__.tag_field
    names = (*kind.__struct_encode_fields__, *((tag,) if tag else ()))
    return tuple(sorted(names, key=lambda name: (len(name), name)))


@functools.cache
def _in_key_order(
    kind: type[msgspec.Struct],
) -> tuple[tuple[str, ...], Callable[[Mapping[str, Any]], tuple[Any, ...]]]:
    """The keys of a kind in order, and what takes the values out of a mapping in this order."""
    keys = _key_order(kind)
    return keys, operator.itemgetter(*keys)


def _decode_plain(data: bytes | memoryview) -> Any:
    raw = bytes(data)
    value = _load(raw)
    _check_same(raw, value)
    _check_plain(value)
    return value


def _load(raw: bytes) -> Any:
    try:
        return cbor2.loads(
            raw,
            max_depth=NESTING_MAX,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
            semantic_decoders=_NO_TAGS,
        )
    except _CBOR_ERRORS as error:
        raise _bad_cbor(error) from error


def _check_same(raw: bytes, value: Any, *, is_sorted: bool = False) -> None:
    """Raises ProtocolError unless these are the deterministic bytes of the value."""
    try:
        same = cbor2.dumps(value, canonical=not is_sorted) == raw
    except _CBOR_ERRORS as error:
        raise _bad_cbor(error) from error
    if not same:
        raise ProtocolError("CBOR is not in its deterministic form", code="BAD_CBOR")


_CBOR_ERRORS = (cbor2.CBORError, ValueError, TypeError, OverflowError, RecursionError)


def _bad_cbor(error: Exception) -> ProtocolError:
    return ProtocolError(f"not valid CBOR: {_brief(error)}", code="BAD_CBOR")


def encode_json(message: object) -> bytes:
    """Compact JSON of a message."""
    value = msgspec.to_builtins(message)
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def decode_json(data: bytes, kind: type[T]) -> T:
    """The message of type `kind` in JSON `data`.

    Raises ProtocolError (theirs) if the bytes are no message of that kind.
    """
    return convert(parse_json(data), kind)


def parse_json(data: bytes) -> Any:
    """JSON as plain values, strictly; raises ProtocolError (theirs)."""
    if _json_depth(data) > NESTING_MAX:
        raise ProtocolError(f"JSON is nested deeper than {NESTING_MAX}", code="BAD_JSON")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
        if b"\\u" in data:  # only so can half of a surrogate pair come in, which no text may hold
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not valid JSON: {_brief(error)}", code="BAD_JSON") from error


def convert(value: Any, kind: type[T]) -> T:
    """Plain values to a typed message; raises ProtocolError (theirs) naming the field."""
    try:
        return msgspec.convert(value, kind, strict=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ProtocolError(f"message refused: {_brief(error)}") from error


_PLAIN_TYPES = frozenset({str, bytes, int, bool, type(None)})


def _check_plain(value: Any) -> None:
    """Raises ProtocolError for a value that JSON would not have either, bytes apart."""
    if isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            if type(item) not in _PLAIN_TYPES:  # asked here: most are, and each frame has dozens
                _check_plain(item)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ProtocolError("a number is not finite", code="BAD_CBOR")
    elif value is not None and not isinstance(value, str | bytes | int):
        raise ProtocolError(f"{type(value).__name__} is no plain value", code="BAD_CBOR")


_STEPS = bytes.maketrans(b"[{]}", bytes((1, 1, 255, 255)))  # as signed bytes: up and down
_NO_STEPS = bytes(set(range(256)) - set(b"[{]}"))


def _json_depth(data: bytes) -> int:
    """Deepest nesting, counted outside of strings, before a parser recurses.

    Nothing of it is done in Python for each byte; behind a mistake in them it may be anything.
    """
    plain = data.replace(rb"\\", b"").replace(rb"\"", b"")
    outside = b"".join(plain.split(b'"')[::2])
    steps = array("b", outside.translate(_STEPS, _NO_STEPS))
    return max(itertools.accumulate(steps, initial=0))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return mapping


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _brief(error: Exception) -> str:
    """The first 200 characters: what a stranger sent is not repeated at length."""
    return str(error)[:200] or type(error).__name__
