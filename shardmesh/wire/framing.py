"""Frames of a link: length-prefixed, sealed records in; header and body out.

    record  = length (4 bytes, big-endian) | sealed frame of that length
    frame   = header length (4 bytes, big-endian) | header (deterministic CBOR) | body (raw bytes)

One record holds one frame.  The length is checked before memory is taken for what it promises.
"""

from __future__ import annotations

import struct

from shardmesh.errors import ProtocolError
from shardmesh.wire.limits import FRAME_BODY_BYTES_MAX, FRAME_HEADER_BYTES_MAX

LENGTH = struct.Struct(">I")
SEAL_BYTES = 16  # the authentication tag of AES-GCM
RECORD_BYTES_MAX = LENGTH.size + FRAME_HEADER_BYTES_MAX + FRAME_BODY_BYTES_MAX + SEAL_BYTES


def encode_frame(header: bytes, body: bytes | memoryview = b"") -> bytes:
    """One frame; raises ProtocolError if header or body is beyond its limit."""
    _check_sizes(len(header), len(body))
    return b"".join((LENGTH.pack(len(header)), header, body))


def decode_frame(frame: bytes | memoryview) -> tuple[memoryview, memoryview]:
    """Header and body of a frame, as views into it; raises ProtocolError (theirs)."""
    view = memoryview(frame)
    if len(view) < LENGTH.size:
        raise ProtocolError("a frame is shorter than its own header length", code="BAD_FRAME")
    (n_header,) = LENGTH.unpack_from(view)
    n_body = len(view) - LENGTH.size - n_header
    if n_body < 0:
        raise ProtocolError("a frame header reaches past the end of its frame", code="BAD_FRAME")
    _check_sizes(n_header, n_body)
    body_start = LENGTH.size + n_header
    return view[LENGTH.size : body_start], view[body_start:]


class RecordReader:
    """Cuts a byte stream into records, however it was cut on its way here."""

    def __init__(self, record_bytes_max: int = RECORD_BYTES_MAX) -> None:
        self._record_bytes_max = record_bytes_max
        self._buffer = bytearray()
        self._n_record: int | None = None

    @property
    def n_wanted(self) -> int:
        """Bytes still missing to the end of the current length or record."""
        target = LENGTH.size if self._n_record is None else self._n_record
        return target - len(self._buffer)

    def feed(self, data: bytes | memoryview) -> list[bytes]:
        """The records that `data` completes; raises ProtocolError (theirs) for a length too large.

        After an error the reader must not be fed again: the stream has lost its frame borders.
        """
        if self._n_record is None and not self._buffer and self._is_one_record(data):
            return [bytes(data[LENGTH.size :])]  # as most come: no copy in between
        self._buffer += data
        records: list[bytes] = []
        while self.n_wanted <= 0:
            if self._n_record is None:
                self._n_record = self._take_length()
            else:
                records.append(self._take(self._n_record))
                self._n_record = None
        return records

    def _is_one_record(self, data: bytes | memoryview) -> bool:
        n_record = len(data) - LENGTH.size
        is_whole = n_record >= 0 and LENGTH.unpack_from(data)[0] == n_record
        return is_whole and n_record <= self._record_bytes_max

    def check_end(self) -> None:
        """Called at the end of the stream; raises ProtocolError if it ended inside a record."""
        if self._buffer or self._n_record is not None:
            raise ProtocolError("the stream ended inside a record", code="BAD_FRAME")

    def _take_length(self) -> int:
        n_record: int = LENGTH.unpack(self._take(LENGTH.size))[0]
        if n_record > self._record_bytes_max:
            raise ProtocolError(
                f"a record of {n_record} bytes was announced, {self._record_bytes_max} are allowed",
                code="FRAME_TOO_LARGE",
            )
        return n_record

    def _take(self, n_bytes: int) -> bytes:
        with memoryview(self._buffer) as view:
            taken = bytes(view[:n_bytes])  # the only copy; cutting the front off makes none
        del self._buffer[:n_bytes]
        return taken


def _check_sizes(n_header: int, n_body: int) -> None:
    if n_header > FRAME_HEADER_BYTES_MAX:
        raise ProtocolError(
            f"a frame header has {n_header} bytes, {FRAME_HEADER_BYTES_MAX} are allowed",
            code="FRAME_TOO_LARGE",
        )
    if n_body > FRAME_BODY_BYTES_MAX:
        raise ProtocolError(
            f"a frame body has {n_body} bytes, {FRAME_BODY_BYTES_MAX} are allowed",
            code="FRAME_TOO_LARGE",
        )
