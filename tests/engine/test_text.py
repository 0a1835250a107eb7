"""Text comes out whole however its bytes are cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardmesh.engine.text import TextDecoder


def decode(data: bytes, cuts: set[int]) -> list[str]:
    decoder = TextDecoder()
    ends = [*sorted(cut for cut in cuts if cut < len(data)), len(data)]
    starts = [0, *ends[:-1]]
    pieces = [decoder.feed(data[a:b]) for a, b in zip(starts, ends, strict=True)]
    return [*pieces, decoder.finish()]


@given(text=st.text(max_size=30), cuts=st.sets(st.integers(0, 60)))
def test_any_cut_gives_the_text_and_never_half_a_character(text: str, cuts: set[int]) -> None:
    pieces = decode(text.encode(), cuts)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(data=st.binary(max_size=30), cuts=st.sets(st.integers(0, 30)))
def test_bytes_that_are_no_text_never_fail(data: bytes, cuts: set[int]) -> None:
    assert "".join(decode(data, cuts)) == data.decode("utf-8", "replace")


@given(text=st.text(max_size=30))
def test_at_most_three_bytes_are_held_back(text: str) -> None:
    decoder = TextDecoder()
    given_back = 0
    for fed, byte in enumerate(text.encode(), start=1):
        given_back += len(decoder.feed(bytes([byte])).encode())
        assert fed - given_back <= 3


def test_an_unfinished_character_shows_at_the_end() -> None:
    decoder = TextDecoder()
    assert decoder.feed("é".encode()[:1]) == ""
    assert decoder.finish() == "\ufffd"
