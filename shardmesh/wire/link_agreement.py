"""Agreeing on a link: what goes over `/shardmesh/link/1.0`, and what both sides make of it.

The side that wants the link sends a LinkRequest inside a libp2p stream, whose Noise handshake has
proven both peer ids.  The other side answers with a LinkOffer: a fresh link id, its public key and
the endpoints where its data process listens.  Then the first side dials one endpoint, or opens a
libp2p stream where none can be dialed, sends the link id and from there on only sealed records.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from typing import Annotated

import msgspec

from shardmesh.errors import ProtocolError, ShardmeshError
from shardmesh.wire.codec import decode_cbor, encode_cbor
from shardmesh.wire.error_report import ErrorReport, told
from shardmesh.wire.limits import ANNOUNCEMENT_ADDRESSES_MAX
from shardmesh.wire.messages import LINK_VERSION
from shardmesh.wire.sealing import (
    LINK_ID_BYTES,
    PUBLIC_KEY_BYTES,
    KeyExchange,
    LinkKeys,
    new_link_id,
)

LINK_PROTOCOL = "/shardmesh/link/1.0"
LINK_STREAM_PROTOCOL = "/shardmesh/link-stream/1.0"

PublicKey = Annotated[bytes, msgspec.Meta(min_length=PUBLIC_KEY_BYTES, max_length=PUBLIC_KEY_BYTES)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Endpoint(_Message, frozen=True):
    """Where a data process accepts connections: an IP address, never a name to look up."""

    host: Annotated[str, msgspec.Meta(max_length=64)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]

    def __post_init__(self) -> None:
        # A zone may hold any character, a zero among them, which the system's calls refuse.
        if "%" in self.host:
            raise ValueError("an endpoint has no zone")
        ipaddress.ip_address(self.host)


class LinkRequest(_Message, frozen=True, tag="request"):
    version: int
    public_key: PublicKey


class LinkOffer(_Message, frozen=True, tag="offer"):
    version: int
    link_id: Annotated[bytes, msgspec.Meta(min_length=LINK_ID_BYTES, max_length=LINK_ID_BYTES)]
    public_key: PublicKey
    endpoints: Annotated[tuple[Endpoint, ...], msgspec.Meta(max_length=ANNOUNCEMENT_ADDRESSES_MAX)]


class LinkRefusal(ErrorReport, frozen=True, tag="refusal"):
    """Why no link is to be had."""


@dataclasses.dataclass(frozen=True)
class LinkGrant:
    """Everything one side needs to bring up a link."""

    link_id: bytes
    keys: LinkKeys
    peer_id: str  # of the other side
    endpoints: tuple[Endpoint, ...] = ()  # where to dial; empty on the accepting side
    stream: Endpoint | None = None  # on this machine: leads there over a libp2p stream


class LinkRequester:
    """The dialing side of one agreement."""

    def __init__(self, own_peer_id: str, other_peer_id: str) -> None:
        self._own_peer_id, self._other_peer_id = own_peer_id, other_peer_id
        self._exchange = KeyExchange()

    def request(self) -> bytes:
        """The bytes to send."""
        return encode_cbor(LinkRequest(version=LINK_VERSION, public_key=self._exchange.public_key))

    def grant(self, answer: bytes) -> LinkGrant:
        """What the answer grants; raises the other side's refusal, or ProtocolError (theirs)."""
        message: LinkOffer | LinkRefusal = decode_cbor(answer, LinkOffer | LinkRefusal)  # type: ignore[arg-type]
        if isinstance(message, LinkRefusal):
            raise message.error()
        _check_version(message.version)
        keys = self._exchange.agree(
            message.public_key,
            link_id=message.link_id,
            dialer=self._own_peer_id,
            acceptor=self._other_peer_id,
        )
        return LinkGrant(message.link_id, keys, self._other_peer_id, message.endpoints)


def answer_request(
    request: bytes, *, own_peer_id: str, other_peer_id: str, endpoints: tuple[Endpoint, ...]
) -> tuple[bytes, LinkGrant]:
    """The offer to send back and the grant to expect; raises ProtocolError (theirs)."""
    message = decode_cbor(request, LinkRequest)
    _check_version(message.version)
    exchange, link_id = KeyExchange(), new_link_id()
    keys = exchange.agree(
        message.public_key, link_id=link_id, dialer=other_peer_id, acceptor=own_peer_id
    )
    offer = LinkOffer(
        version=LINK_VERSION,
        link_id=link_id,
        public_key=exchange.public_key,
        endpoints=endpoints,
    )
    return encode_cbor(offer), LinkGrant(link_id, keys, other_peer_id)


def encode_refusal(error: ShardmeshError) -> bytes:
    """The answer when no link is to be had."""
    return encode_cbor(LinkRefusal(**told(error)))


def _check_version(version: int) -> None:
    if version != LINK_VERSION:
        raise ProtocolError(
            f"the other side speaks link version {version}, this one {LINK_VERSION}",
            code="LINK_VERSION",
            next_step="run the same version of Shardmesh on both machines",
        )
