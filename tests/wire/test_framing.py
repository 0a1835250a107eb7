"""Records and frames: however the stream was cut, and one past every limit."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmesh.errors import ProtocolError
from shardmesh.wire.framing import (
    LENGTH,
    RECORD_BYTES_MAX,
    RecordReader,
    decode_frame,
    encode_frame,
)
from shardmesh.wire.limits import FRAME_BODY_BYTES_MAX, FRAME_HEADER_BYTES_MAX

record_lists = st.lists(st.binary(max_size=50), max_size=6)


def stream_of(records: list[bytes]) -> bytes:
    return b"".join(LENGTH.pack(len(record)) + record for record in records)


def feed_all(reader: RecordReader, pieces: list[bytes]) -> list[bytes]:
    return [record for piece in pieces for record in reader.feed(piece)]


@given(record_lists, st.data())
def test_records_come_out_however_the_stream_was_cut(
    records: list[bytes], data: st.DataObject
) -> None:
    stream = stream_of(records)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8).map(sorted))
    anywhere = [stream[a:b] for a, b in itertools.pairwise([0, *cuts, len(stream)])]
    for pieces in ([stream], [bytes([byte]) for byte in stream], anywhere):
        reader = RecordReader()
        assert feed_all(reader, pieces) == records
        reader.check_end()


@given(record_lists.filter(bool), st.data())
def test_a_stream_that_ends_inside_a_record_is_noticed(
    records: list[bytes], data: st.DataObject
) -> None:
    stream = stream_of(records)
    n_last = LENGTH.size + len(records[-1])
    cut = data.draw(st.integers(len(stream) - n_last + 1, len(stream) - 1))
    reader = RecordReader()
    assert reader.feed(stream[:cut]) == records[:-1]
    assert reader.n_wanted > 0
    with pytest.raises(ProtocolError):
        reader.check_end()


@given(st.binary(max_size=200))
def test_garbage_is_records_or_a_protocol_error(data: bytes) -> None:
    reader = RecordReader(record_bytes_max=64)
    try:
        records = reader.feed(data)
    except ProtocolError:
        return
    assert all(len(record) <= 64 for record in records)


def test_the_longest_record_is_taken_and_one_past_it_is_not() -> None:
    reader = RecordReader(record_bytes_max=10)
    assert reader.feed(LENGTH.pack(10) + bytes(10)) == [bytes(10)]
    with pytest.raises(ProtocolError) as caught:
        RecordReader(record_bytes_max=10).feed(LENGTH.pack(11))
    assert caught.value.code == "FRAME_TOO_LARGE"
    assert RecordReader().feed(LENGTH.pack(RECORD_BYTES_MAX)) == []
    with pytest.raises(ProtocolError):
        RecordReader().feed(LENGTH.pack(RECORD_BYTES_MAX + 1))


@pytest.mark.parametrize("n_claimed", [RECORD_BYTES_MAX, 2**32 - 1])
def test_a_record_that_is_only_claimed_takes_no_memory(n_claimed: int) -> None:
    reader = RecordReader()
    tracemalloc.start()
    try:
        if n_claimed > RECORD_BYTES_MAX:
            with pytest.raises(ProtocolError):
                reader.feed(LENGTH.pack(n_claimed) + b"x")
        else:
            assert reader.feed(LENGTH.pack(n_claimed) + b"x") == []
            assert reader.n_wanted == n_claimed - 1
        assert tracemalloc.get_traced_memory()[1] < 64 * 1024
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_a_frame_goes_round(header: bytes, body: bytes) -> None:
    found_header, found_body = decode_frame(encode_frame(header, body))
    assert (bytes(found_header), bytes(found_body)) == (header, body)


@given(st.binary(max_size=60))
def test_a_frame_of_garbage_is_a_protocol_error_or_consistent(frame: bytes) -> None:
    try:
        header, body = decode_frame(frame)
    except ProtocolError:
        return
    assert LENGTH.size + len(header) + len(body) == len(frame)


@pytest.mark.parametrize("frame", [b"", b"\0\0\0", LENGTH.pack(1), LENGTH.pack(2**32 - 1) + b"abc"])
def test_a_frame_shorter_than_it_says_is_refused(frame: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_frame(frame)
    assert caught.value.code == "BAD_FRAME"


def test_header_and_body_at_their_limits_and_one_past_them() -> None:
    body = memoryview(bytearray(FRAME_BODY_BYTES_MAX + 1))
    header = bytes(FRAME_HEADER_BYTES_MAX)
    found_header, _ = decode_frame(encode_frame(header))
    assert len(found_header) == FRAME_HEADER_BYTES_MAX
    _, found_body = decode_frame(encode_frame(b"", body[:-1]))
    assert len(found_body) == FRAME_BODY_BYTES_MAX
    for too_long in ((header + b"x", b""), (b"", body)):
        with pytest.raises(ProtocolError):
            encode_frame(*too_long)
    with pytest.raises(ProtocolError):
        decode_frame(LENGTH.pack(FRAME_HEADER_BYTES_MAX + 1) + header + b"x")
    with pytest.raises(ProtocolError):
        decode_frame(LENGTH.pack(0) + bytes(body))
