"""Keys of a link: both sides agree, and only the next record of the right link opens."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from shardmesh.errors import ProtocolError
from shardmesh.wire.framing import SEAL_BYTES
from shardmesh.wire.sealing import (
    LINK_ID_BYTES,
    DirectionKey,
    KeyExchange,
    LinkKeys,
    Opener,
    Sealer,
    new_link_id,
)

KEY = DirectionKey(bytes(range(32)), bytes(range(12)))
frames = st.lists(st.binary(max_size=40), min_size=1, max_size=5)


def agree(dialer: str, acceptor: str, link_id: bytes = bytes(16)) -> tuple[LinkKeys, LinkKeys]:
    here, there = KeyExchange(), KeyExchange()
    names = {"link_id": link_id, "dialer": dialer, "acceptor": acceptor}
    return here.agree(there.public_key, **names), there.agree(here.public_key, **names)


def test_both_sides_find_the_same_keys_and_each_direction_has_its_own() -> None:
    mine, yours = agree("a", "b")
    assert mine == yours
    assert mine.dialer_to_acceptor != mine.acceptor_to_dialer


def test_keys_depend_on_link_and_names() -> None:
    here, there = KeyExchange(), KeyExchange()

    def keys(link_id: bytes, dialer: str, acceptor: str) -> LinkKeys:
        return here.agree(there.public_key, link_id=link_id, dialer=dialer, acceptor=acceptor)

    found = [
        keys(bytes(16), "a", "b"),
        keys(bytes(15) + b"\x01", "a", "b"),
        keys(bytes(16), "b", "a"),
        keys(bytes(16), "a", "c"),
    ]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31), bytes(31), b"", bytes(33)])
def test_keys_that_force_the_secret_or_are_none_are_refused(key: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        KeyExchange().agree(key, link_id=bytes(16), dialer="a", acceptor="b")
    assert caught.value.code == "BAD_KEY"


def test_keys_are_not_shown() -> None:
    assert repr(KEY) == "DirectionKey()"


def test_link_ids_are_fresh() -> None:
    ids = {new_link_id() for _ in range(100)}
    assert len(ids) == 100
    assert {len(link_id) for link_id in ids} == {LINK_ID_BYTES}


@given(frames)
def test_records_open_in_their_order(plain: list[bytes]) -> None:
    sealer, opener = Sealer(KEY), Opener(KEY)
    sealed = [sealer.seal(frame) for frame in plain]
    assert [len(s) - len(p) for s, p in zip(sealed, plain, strict=True)] == [SEAL_BYTES] * len(
        plain
    )
    assert [opener.open(record) for record in sealed] == plain


@given(frames.filter(lambda f: len(f) > 1), st.data())
def test_a_record_out_of_its_turn_does_not_open(plain: list[bytes], data: st.DataObject) -> None:
    sealer, opener = Sealer(KEY), Opener(KEY)
    sealed = [sealer.seal(frame) for frame in plain]
    due = data.draw(st.integers(0, len(sealed) - 1))
    other = data.draw(st.integers(0, len(sealed) - 1).filter(lambda i: i != due))
    for record in sealed[:due]:
        opener.open(record)
    with pytest.raises(ProtocolError) as caught:
        opener.open(sealed[other])
    assert caught.value.code == "BAD_SEAL"


@given(st.binary(max_size=40), st.data())
def test_an_altered_or_cut_record_does_not_open(plain: bytes, data: st.DataObject) -> None:
    sealed = Sealer(KEY).seal(plain)
    at = data.draw(st.integers(0, len(sealed) - 1))
    flipped = sealed[at] ^ data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolError):
        Opener(KEY).open(sealed[:at] + bytes([flipped]) + sealed[at + 1 :])
    with pytest.raises(ProtocolError):
        Opener(KEY).open(sealed[:at])


def test_a_record_of_the_other_direction_does_not_open() -> None:
    keys, _ = agree("a", "b")
    with pytest.raises(ProtocolError):
        Opener(keys.acceptor_to_dialer).open(Sealer(keys.dialer_to_acceptor).seal(b"frame"))


def test_the_nonce_is_the_iv_xor_the_number_of_the_record() -> None:
    sealer = Sealer(KEY)
    cipher = AESGCM(KEY.key)
    for number in range(300):
        last = int.from_bytes(KEY.iv, "big") ^ number
        assert sealer.seal(b"f") == cipher.encrypt(last.to_bytes(12, "big"), b"f", None)
