"""Agreeing on a link: the same keys on both sides, and every way to say no."""

from __future__ import annotations

from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmesh.errors import BusyError, ProtocolError, ShardmeshError
from shardmesh.wire.limits import ANNOUNCEMENT_ADDRESSES_MAX, LINK_AGREEMENT_BYTES_MAX
from shardmesh.wire.link_agreement import (
    Endpoint,
    LinkGrant,
    LinkRequester,
    answer_request,
    encode_refusal,
)
from shardmesh.wire.sealing import KeyExchange

ENDPOINTS = (Endpoint(host="127.0.0.1", port=4001), Endpoint(host="::1", port=4001))


def answer(request: bytes) -> tuple[bytes, LinkGrant]:
    return answer_request(
        request, own_peer_id="acceptor", other_peer_id="dialer", endpoints=ENDPOINTS
    )


def changed(message: bytes, **fields: Any) -> bytes:
    return cbor2.dumps({**cbor2.loads(message), **fields}, canonical=True)


def test_both_sides_hold_the_same_link() -> None:
    requester = LinkRequester("dialer", "acceptor")
    offer, expected = answer(requester.request())
    grant = requester.grant(offer)
    assert (grant.link_id, grant.keys) == (expected.link_id, expected.keys)
    assert (grant.peer_id, expected.peer_id) == ("acceptor", "dialer")
    assert grant.endpoints == ENDPOINTS
    assert expected.endpoints == ()


def test_two_agreements_never_share_id_or_keys() -> None:
    requester = LinkRequester("dialer", "acceptor")
    request = requester.request()
    grants = [answer(request)[1] for _ in range(2)]
    assert grants[0].link_id != grants[1].link_id
    assert grants[0].keys != grants[1].keys


def test_an_agreement_made_with_another_node_gives_other_keys() -> None:
    requester = LinkRequester("dialer", "somebody else")
    offer, expected = answer(requester.request())
    assert requester.grant(offer).keys != expected.keys


def test_a_refusal_is_raised_as_what_it_is() -> None:
    refusal = encode_refusal(BusyError("no room", next_step="wait"))
    with pytest.raises(BusyError, match="no room") as caught:
        LinkRequester("a", "b").grant(refusal)
    assert caught.value.next_step == "wait"


def test_another_version_is_refused_on_both_sides() -> None:
    requester = LinkRequester("dialer", "acceptor")
    with pytest.raises(ProtocolError) as caught:
        answer(changed(requester.request(), version=2))
    assert caught.value.code == "LINK_VERSION"
    offer, _ = answer(requester.request())
    with pytest.raises(ProtocolError) as caught:
        requester.grant(changed(offer, version=2))
    assert caught.value.code == "LINK_VERSION"


@pytest.mark.parametrize(
    "change",
    [
        {"public_key": bytes(32)},
        {"public_key": bytes(31)},
        {"link_id": bytes(15)},
        {"endpoints": [{"host": "127.0.0.1", "port": 1}] * (ANNOUNCEMENT_ADDRESSES_MAX + 1)},
        {"endpoints": [{"host": "127.0.0.1", "port": 0}]},
        {"endpoints": [{"host": "127.0.0.1", "port": 65536}]},
        {"endpoints": [{"host": "name.example", "port": 1}]},
        {"endpoints": [{"host": "127.0.0.1\0", "port": 1}]},
        {"endpoints": [{"host": "fe80::1%\0", "port": 1}]},
        {"endpoints": [{"host": "", "port": 1}]},
        {"endpoints": [{"host": "1" * 257, "port": 1}]},
        {"extra": 1},
        {"type": "request"},
    ],
)
def test_an_offer_that_cannot_be_used_is_refused(change: dict[str, Any]) -> None:
    requester = LinkRequester("dialer", "acceptor")
    offer, _ = answer(requester.request())
    requester.grant(offer)
    with pytest.raises(ProtocolError):
        requester.grant(changed(offer, **change))


@pytest.mark.parametrize(
    "change", [{"public_key": bytes(32)}, {"public_key": b""}, {"extra": 1}, {"type": "offer"}]
)
def test_a_request_that_cannot_be_used_is_refused(change: dict[str, Any]) -> None:
    request = LinkRequester("dialer", "acceptor").request()
    with pytest.raises(ProtocolError):
        answer(changed(request, **change))


@given(st.binary(max_size=80))
def test_garbage_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        answer(data)
    with pytest.raises(ProtocolError):
        LinkRequester("a", "b").grant(data)


@given(st.data())
def test_an_altered_agreement_never_raises_anything_else(data: st.DataObject) -> None:
    requester = LinkRequester("dialer", "acceptor")
    request = requester.request()
    offer, _ = answer(request)
    at, flip = data.draw(st.integers(0, len(request) - 1)), data.draw(st.integers(1, 255))
    for message, take in ((request, answer), (offer, requester.grant)):
        altered = bytearray(message)
        altered[at] ^= flip
        try:
            take(bytes(altered))  # type: ignore[operator]
        except ProtocolError:
            continue


def test_the_longest_messages_fit_their_limit() -> None:
    endpoints = tuple(
        Endpoint(host="ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255", port=65535)
        for _ in range(ANNOUNCEMENT_ADDRESSES_MAX)
    )
    offer, _ = answer_request(
        LinkRequester("a", "b").request(),
        own_peer_id="b" * 52,
        other_peer_id="a" * 52,
        endpoints=endpoints,
    )
    assert len(offer) <= LINK_AGREEMENT_BYTES_MAX
    long = ShardmeshError("x" * 3000, code="C" * 64, next_step="y" * 1000)
    assert len(encode_refusal(long)) <= LINK_AGREEMENT_BYTES_MAX
    assert KeyExchange().public_key != KeyExchange().public_key
