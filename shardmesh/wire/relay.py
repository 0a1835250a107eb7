"""What nodes say to be reached: asking to be dialed back, and asking a relay to pass bytes on.

A reserved node is called through the relay: the relay opens a stream to it and carries bytes, in
which the two ends then make the same handshake as over TCP.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from shardmesh.errors import ShardmeshError
from shardmesh.wire.error_report import ErrorReport, told
from shardmesh.wire.limits import DIAL_BACK_PORTS_MAX, RELAY_ADDRESSES_MAX

DIAL_BACK_PROTOCOL: Final = "/shardmesh/dial-back/1.0"
RELAY_PROTOCOL: Final = "/shardmesh/relay/1.0"
RELAYED_PROTOCOL: Final = "/shardmesh/relayed/1.0"

PeerId = Annotated[str, msgspec.Meta(max_length=128)]
Address = Annotated[str, msgspec.Meta(max_length=256)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class DialBackRequest(_Message, frozen=True):
    """Asks to be dialed at the address that the asker is seen at: only the ports are its word."""

    ports: Annotated[tuple[Port, ...], msgspec.Meta(min_length=1, max_length=DIAL_BACK_PORTS_MAX)]


class DialBackAnswer(_Message, frozen=True):
    """Where the asker is seen, and at which of its ports it answered with its own key."""

    host: Annotated[str, msgspec.Meta(max_length=64)]
    reached: Annotated[tuple[Port, ...], msgspec.Meta(max_length=DIAL_BACK_PORTS_MAX)]


class Reserve(_Message, frozen=True, tag="reserve"):
    """Asks for a place on the relay, or for more time on it."""


class Reserved(_Message, frozen=True, tag="reserved"):
    """The place is there as long as the connection is, and for so long."""

    lifetime_s: Annotated[int, msgspec.Meta(ge=1, le=86400)]
    addresses: Annotated[tuple[Address, ...], msgspec.Meta(max_length=RELAY_ADDRESSES_MAX)]


class Call(_Message, frozen=True, tag="call"):
    """Asks for a way to a node that has a place."""

    peer_id: PeerId


class Carried(_Message, frozen=True, tag="carried"):
    """What follows on this stream is the called node's."""


class RelayRefusal(ErrorReport, frozen=True, tag="refusal"):
    """Why the relay does not do it."""


RelayRequest = Reserve | Call
RelayAnswer = Reserved | Carried | RelayRefusal


def refusal_of(error: ShardmeshError) -> RelayRefusal:
    """An error as the answer of a relay."""
    return RelayRefusal(**told(error))
