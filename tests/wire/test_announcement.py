from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
from support.announcements import an_announcement

from shardmesh.errors import ProtocolError
from shardmesh.swarm.identity import Identity, new_identity
from shardmesh.wire.announcement import (
    Announcement,
    check_timely,
    encode_signed,
    open_signed,
)
from shardmesh.wire.codec import decode_cbor, encode_cbor
from shardmesh.wire.peer_id import is_peer_id, peer_id_of, public_key_of

NOW_S = 1_700_000_000
ALICE, MALLORY = new_identity(), new_identity()


def announcement(identity: Identity = ALICE, **changes: object) -> Announcement:
    plain = an_announcement(
        identity,
        shard_id=1,
        layer_start=2,
        layer_end=4,
        addresses=(f"/ip4/10.0.0.1/tcp/4001/p2p/{identity.peer_id}", "/dns4/host.example/tcp/4001"),
        sequence=7,
        issued_at_s=NOW_S,
        expires_at_s=NOW_S + 600,
    )
    return msgspec.structs.replace(plain, **changes)


def decode(data: bytes, now_s: float = NOW_S) -> Announcement:
    found = open_signed(data)
    check_timely(found, cluster="llama-cluster", now_s=now_s)
    return found


def test_what_was_signed_comes_out() -> None:
    assert decode(encode_signed(announcement(), ALICE)) == announcement()


@given(st.integers(min_value=0), st.integers(min_value=1, max_value=255))
def test_one_changed_byte_is_refused(place: int, change: int) -> None:
    data = bytearray(encode_signed(announcement(), ALICE))
    data[place % len(data)] ^= change
    with pytest.raises(ProtocolError):
        open_signed(bytes(data))


@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        open_signed(data)


def test_nobody_speaks_for_another() -> None:
    with pytest.raises(ProtocolError, match="another node"):
        encode_signed(announcement(ALICE), MALLORY)
    envelope = decode_cbor(encode_signed(announcement(ALICE), ALICE), dict[str, bytes])
    forged = encode_cbor({**envelope, "public_key": MALLORY.public_key})
    with pytest.raises(ProtocolError, match="signature"):
        open_signed(forged)


def test_a_signature_for_another_purpose_does_not_count() -> None:
    body = encode_cbor(announcement())
    without_domain = {
        "public_key": ALICE.public_key,
        "signature": ALICE.sign(body),
        "body": body,
    }
    with pytest.raises(ProtocolError, match="signature"):
        open_signed(encode_cbor(without_domain))


@pytest.mark.parametrize(
    ("now_s", "code"),
    [(NOW_S + 600, "EXPIRED"), (NOW_S - 121, "WRONG_CLOCK")],
)
def test_only_now(now_s: float, code: str) -> None:
    data = encode_signed(announcement(), ALICE)
    with pytest.raises(ProtocolError) as caught:
        decode(data, now_s)
    assert caught.value.code == code


def test_just_in_time() -> None:
    data = encode_signed(announcement(), ALICE)
    assert decode(data, NOW_S + 599.9)
    assert decode(data, NOW_S - 120)


def test_another_cluster_is_refused() -> None:
    data = encode_signed(announcement(cluster="another"), ALICE)
    with pytest.raises(ProtocolError, match="cluster 'another'"):
        decode(data)


def test_withdrawal_is_known_as_one() -> None:
    withdrawal = announcement(expires_at_s=NOW_S)
    assert open_signed(encode_signed(withdrawal, ALICE)).is_withdrawal
    with pytest.raises(ProtocolError):
        decode(encode_signed(withdrawal, ALICE))


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_end": 9},
        {"layer_start": 5},
        {"layer_start": 4},  # loaded, but no layer
        {"shard_id": 4},
        {"expires_at_s": NOW_S + 601},
        {"expires_at_s": NOW_S - 1},
        {"schema_version": 2},
        {"addresses": ("/ip4/10.0.0.1/udp/4001",)},
        {"addresses": (f"/ip4/10.0.0.1/tcp/4001/p2p/{MALLORY.peer_id}",)},
        {"addresses": ("/ip4/10.0.0.1/tcp/4001",) * 17},
        {"model_name": "m" * 129},
        {"model_name": "\x1b[2J"},
        {"sequence": -1},
    ],
)
def test_nonsense_is_refused_even_if_signed(changes: dict[str, object]) -> None:
    with pytest.raises((ProtocolError, ValueError)):
        encode_signed(announcement(**changes), ALICE)


@given(st.binary(min_size=32, max_size=32))
def test_peer_ids_are_those_of_libp2p(seed: bytes) -> None:
    public_key = create_new_key_pair(seed).public_key
    peer_id = peer_id_of(public_key.to_bytes())
    assert peer_id == str(ID.from_pubkey(public_key))
    assert peer_id.startswith("12D3KooW")
    assert public_key_of(peer_id) == public_key.to_bytes()


@given(st.text(max_size=60))
def test_text_is_no_peer_id(text: str) -> None:
    assert not is_peer_id(text)
