"""The owner's word that the cluster's secret has changed and who is no member any more.

Members hand it on to each other over connections that exist already, so whoever is removed and does
not get it stands outside, under any peer id.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from shardmesh.errors import InputError, ProtocolError
from shardmesh.wire.announcement import Name
from shardmesh.wire.cluster_secret import ClusterSecret, owner_of, parse_secret
from shardmesh.wire.codec import decode_cbor, encode_cbor
from shardmesh.wire.envelope import Signer, open_envelope, sign_body
from shardmesh.wire.limits import CLUSTER_UPDATE_BYTES_MAX, REMOVED_NODES_MAX
from shardmesh.wire.peer_id import is_peer_id

CLUSTER_PROTOCOL: Final = "/shardmesh/cluster/1.0"
_DOMAIN: Final = b"shardmesh cluster update 1\0"


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class ClusterUpdate(_Message, frozen=True):
    """A new secret, whose owner is the old one's, and peer ids that are turned away from now on."""

    cluster: Name
    sequence: Annotated[int, msgspec.Meta(ge=0, lt=2**53)]  # higher is newer
    secret: Annotated[str, msgspec.Meta(max_length=128)]
    removed: Annotated[tuple[Name, ...], msgspec.Meta(max_length=REMOVED_NODES_MAX)]

    def __post_init__(self) -> None:
        try:
            parse_secret(self.secret)
        except InputError as error:
            raise ValueError("the secret is none") from error
        if not all(is_peer_id(peer_id) for peer_id in self.removed):
            raise ValueError("what is removed is no peer id")

    def new_secret(self) -> ClusterSecret:
        return parse_secret(self.secret)

    def __repr__(self) -> str:
        return f"ClusterUpdate({self.cluster!r}, {self.sequence}, {len(self.removed)} removed)"


class ClusterAnswer(_Message, frozen=True):
    """Whether the update was news to the node; it hands on what was."""

    is_news: bool


def sign_update(update: ClusterUpdate, owner: Signer) -> bytes:
    """The signed bytes; ProtocolError if they are too long to be taken."""
    data = sign_body(encode_cbor(update), _DOMAIN, owner)
    if len(data) > CLUSTER_UPDATE_BYTES_MAX:
        raise ProtocolError(f"an update of {len(data)} bytes", code="TOO_LARGE")
    return data


def open_update(data: bytes, *, cluster: str, owner: bytes) -> ClusterUpdate:
    """The update in signed bytes, if the owner of this cluster signed it for this cluster.

    Raises ProtocolError (theirs): BAD_SIGNATURE for one that somebody else signed.
    """
    envelope = open_envelope(data, CLUSTER_UPDATE_BYTES_MAX, "an update")
    if owner_of(envelope.public_key) != owner or not envelope.is_signed_as(_DOMAIN):
        raise ProtocolError("the cluster's owner did not sign this update", code="BAD_SIGNATURE")
    update = decode_cbor(envelope.body, ClusterUpdate)
    if update.cluster != cluster or update.new_secret().owner != owner:
        raise ProtocolError("an update of another cluster", code="BAD_SIGNATURE")
    return update
