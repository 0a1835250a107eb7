"""Bencode, the encoding of torrent files (BEP 3), in its one canonical form and with bounds."""

from __future__ import annotations

from typing import Final

from shardmesh.errors import ProtocolError
from shardmesh.wire.limits import TORRENT_BYTES_MAX, TORRENT_NESTING_MAX

Bencoded = int | bytes | list["Bencoded"] | dict[bytes, "Bencoded"]

_DIGITS_MAX: Final = 19  # of a number below 2^63


def encode_bencode(value: Bencoded) -> bytes:
    """The canonical bytes of a value: keys sorted."""
    match value:
        case int():
            return b"i%de" % value
        case bytes():
            return b"%d:%b" % (len(value), value)
        case list():
            return b"l" + b"".join(encode_bencode(item) for item in value) + b"e"
        case dict():
            items = (encode_bencode(key) + encode_bencode(value[key]) for key in sorted(value))
            return b"d" + b"".join(items) + b"e"


def decode_bencode(data: bytes) -> Bencoded:
    """The value in the bytes, which must be its canonical form and nothing behind it.

    Raises ProtocolError (theirs, BAD_TORRENT) for anything else, and for more than
    TORRENT_BYTES_MAX bytes or TORRENT_NESTING_MAX levels.
    """
    if len(data) > TORRENT_BYTES_MAX:
        raise _bad(f"{len(data)} bytes")
    value, end = _decode(data, 0, TORRENT_NESTING_MAX)
    if end != len(data):
        raise _bad("bytes behind the end")
    return value


def _decode(data: bytes, at: int, depth: int) -> tuple[Bencoded, int]:
    """The value that begins there, and where it ends."""
    kind = data[at : at + 1]
    if kind.isdigit():
        return _decode_text(data, at)
    if kind == b"i":
        return _decode_number(data, at + 1, b"e")
    if kind not in (b"l", b"d"):
        raise _bad(f"nothing that can stand at {at}")
    if depth == 0:
        raise _bad(f"nested deeper than {TORRENT_NESTING_MAX}")
    if kind == b"l":
        return _decode_list(data, at + 1, depth - 1)
    return _decode_dictionary(data, at + 1, depth - 1)


def _decode_text(data: bytes, at: int) -> tuple[bytes, int]:
    length, start = _decode_number(data, at, b":")
    end = start + length
    if end > len(data):
        raise _bad(f"a string at {at} beyond the end")
    return data[start:end], end


def _decode_number(data: bytes, at: int, stop: bytes) -> tuple[int, int]:
    end = data.find(stop, at, at + _DIGITS_MAX + 2)
    digits = data[at:end] if end > 0 else b""
    value = int(digits) if digits.removeprefix(b"-").isdigit() else None
    if value is None or digits != b"%d" % value:
        raise _bad(f"no number at {at}")
    return value, end + 1


def _decode_list(data: bytes, at: int, depth: int) -> tuple[list[Bencoded], int]:
    items: list[Bencoded] = []
    while data[at : at + 1] != b"e":
        item, at = _decode(data, at, depth)
        items.append(item)
    return items, at + 1


def _decode_dictionary(data: bytes, at: int, depth: int) -> tuple[dict[bytes, Bencoded], int]:
    values: dict[bytes, Bencoded] = {}
    last: bytes | None = None
    while data[at : at + 1] != b"e":
        if not data[at : at + 1].isdigit():
            raise _bad(f"no key at {at}")
        key, at = _decode_text(data, at)
        if last is not None and key <= last:
            raise _bad("keys out of order")
        last = key
        values[key], at = _decode(data, at, depth)
    return values, at + 1


def _bad(what: str) -> ProtocolError:
    return ProtocolError(f"a torrent that is not canonical bencode: {what}", code="BAD_TORRENT")
