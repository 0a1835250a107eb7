"""Who serves which shard of which model, where, with what: signed by the one who says it.

The signature covers a domain string and the CBOR of the announcement; the key in the envelope must
be the one that the peer id is made of.  So an announcement may come from anybody, over the DHT or
from a neighbour, and still be believed, until it expires.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec

from shardmesh.errors import ProtocolError
from shardmesh.wire.codec import decode_cbor, encode_cbor
from shardmesh.wire.envelope import Signer, open_envelope, sign_body
from shardmesh.wire.limits import (
    ANNOUNCEMENT_ADDRESSES_MAX,
    ANNOUNCEMENT_BYTES_MAX,
    ANNOUNCEMENT_CLOCK_SKEW_MAX_S,
    ANNOUNCEMENT_LIFETIME_MAX_S,
    DIRECTORY_ENTRIES_MAX,
    DIRECTORY_PUSH_MAX,
    ROUND_TRIPS_MAX,
)
from shardmesh.wire.node_identity import NO_IDENTITY, NodeIdentity
from shardmesh.wire.peer_id import peer_id_of

SCHEMA_VERSION: Final = 1
_DOMAIN: Final = b"shardmesh announcement 1\0"
_ADDRESS: Final = re.compile(
    r"/(ip4|ip6|dns|dns4|dns6)/[^/\s]{1,200}/tcp/\d{1,5}(/p2p/\w{52}/p2p-circuit)?"
    r"(/p2p/(?P<peer_id>\w{52}))?",
    re.ASCII,
)

Name = Annotated[str, msgspec.Meta(max_length=128)]
Address = Annotated[str, msgspec.Meta(max_length=256)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Microseconds = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
Seconds = Annotated[int, msgspec.Meta(ge=0, lt=2**40)]  # since 1970


class Capabilities(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a listener has and can do."""

    shard_loaded: bool
    memory_mb: Count
    memory_available_mb: Count
    cpu_cores: Count
    gpu_available: bool
    n_ctx: Count  # tokens of one sequence; 0 while no shard is loaded
    n_parallel: Count
    has_tokenizer: bool
    is_draining: bool = False  # takes no new sessions
    wants_to_leave: bool = False  # for another shard, unless others leave this one; takes sessions
    n_sessions: Count = 0  # sequences in use when this was said
    token_us: Microseconds = 0  # computing one token, of late; 0: not known
    round_trips_us: Annotated[
        tuple[tuple[Name, Microseconds], ...], msgspec.Meta(max_length=ROUND_TRIPS_MAX)
    ] = ()  # to nodes that this one has links to, by peer id


class Announcement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One listener's word about itself.

    `layer_end` may equal `layer_start` only while no shard is loaded: such a listener may not
    know yet which layers its shard will have.
    """

    schema_version: Annotated[int, msgspec.Meta(ge=SCHEMA_VERSION, le=SCHEMA_VERSION)] = (
        SCHEMA_VERSION
    )
    cluster: Name
    peer_id: Name
    shard_id: Count
    total_shards: Count
    total_layers: Count
    layer_start: Count
    layer_end: Count
    model_name: Name
    manifest_digest: Name
    engine_fingerprint: Name
    addresses: Annotated[tuple[Address, ...], msgspec.Meta(max_length=ANNOUNCEMENT_ADDRESSES_MAX)]
    capabilities: Capabilities
    identity: NodeIdentity = NO_IDENTITY
    sequence: Annotated[int, msgspec.Meta(ge=0, lt=2**53)]  # higher is newer
    issued_at_s: Seconds
    expires_at_s: Seconds  # equal to issued_at_s: the listener takes its announcement back

    def __post_init__(self) -> None:
        if not 0 <= self.layer_start <= self.layer_end <= self.total_layers:
            raise ValueError("the layer range is not inside the model")
        if self.capabilities.shard_loaded and self.layer_start == self.layer_end:
            raise ValueError("a loaded shard has at least one layer")
        if self.shard_id >= max(self.total_shards, 1):
            raise ValueError("the shard id is not below the number of shards")
        if not self.model_name.isprintable():  # it is written on terminals
            raise ValueError("the model name has characters that cannot be printed")
        if not 0 <= self.expires_at_s - self.issued_at_s <= ANNOUNCEMENT_LIFETIME_MAX_S:
            raise ValueError(f"the lifetime is not within {ANNOUNCEMENT_LIFETIME_MAX_S} s")
        for address in self.addresses:
            match = _ADDRESS.fullmatch(address)
            if match is None or match["peer_id"] not in (None, self.peer_id):
                raise ValueError("an address is not a TCP address of this node")

    @property
    def is_withdrawal(self) -> bool:
        return self.expires_at_s == self.issued_at_s


def encode_signed(announcement: Announcement, signer: Signer) -> bytes:
    """The signed bytes of an announcement, at most ANNOUNCEMENT_BYTES_MAX.

    Raises ProtocolError if it would be refused by others: too long, or not the signer's own.
    """
    data = sign_body(encode_cbor(announcement), _DOMAIN, signer)
    open_signed(data)
    return data


def open_signed(data: bytes) -> Announcement:
    """The announcement in signed bytes, whatever its cluster and however old.

    Raises ProtocolError (theirs): BAD_SIGNATURE for one that its node did not sign.
    """
    envelope = open_envelope(data, ANNOUNCEMENT_BYTES_MAX, "an announcement")
    if not envelope.is_signed_as(_DOMAIN):
        raise ProtocolError("the signature of an announcement is wrong", code="BAD_SIGNATURE")
    announcement = decode_cbor(envelope.body, Announcement)
    if announcement.peer_id != peer_id_of(envelope.public_key):
        raise ProtocolError("an announcement speaks for another node", code="BAD_SIGNATURE")
    return announcement


def check_not_ahead(announcement: Announcement, now_s: float) -> None:
    """Raises ProtocolError (theirs, WRONG_CLOCK) for the future; `now_s` is wall-clock time.

    Withdrawals too: until then nothing that the node says would be newer.
    """
    if announcement.issued_at_s > now_s + ANNOUNCEMENT_CLOCK_SKEW_MAX_S:
        raise ProtocolError(
            f"an announcement from the future; the clock of {announcement.peer_id} or of this "
            "machine is wrong",
            code="WRONG_CLOCK",
        )


def check_timely(announcement: Announcement, *, cluster: str, now_s: float) -> None:
    """Raises ProtocolError (theirs) for another cluster, the past (EXPIRED) or the future.

    A withdrawal counts as expired.
    """
    if announcement.cluster != cluster:
        raise ProtocolError(f"an announcement for cluster {announcement.cluster!r}")
    check_not_ahead(announcement, now_s)
    if announcement.is_withdrawal or announcement.expires_at_s <= now_s:
        raise ProtocolError("an announcement has expired", code="EXPIRED")


DIRECTORY_PROTOCOL: Final = "/shardmesh/directory/1.0"

SignedAnnouncement = Annotated[bytes, msgspec.Meta(max_length=ANNOUNCEMENT_BYTES_MAX)]


class DirectoryRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Hands over signed announcements and, if `pull` is set, asks for all that are known."""

    cluster: Name
    push: Annotated[tuple[SignedAnnouncement, ...], msgspec.Meta(max_length=DIRECTORY_PUSH_MAX)]
    pull: bool


class DirectoryResponse(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the other side knows; nothing if it was not asked, or is of another cluster."""

    cluster: Name  # of the side that answers
    announcements: Annotated[
        tuple[SignedAnnouncement, ...], msgspec.Meta(max_length=DIRECTORY_ENTRIES_MAX)
    ]


DIRECTORY_NEWS_PROTOCOL: Final = "/shardmesh/directory-news/1.0"


class DirectoryFollow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Asks a directory to tell all that it knows, and from then on what changes."""

    cluster: Name


class DirectoryNews(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is new since the last news of the same stream; empty as a sign of life."""

    announcements: Annotated[
        tuple[SignedAnnouncement, ...], msgspec.Meta(max_length=DIRECTORY_ENTRIES_MAX)
    ]
    gone: Annotated[tuple[Name, ...], msgspec.Meta(max_length=DIRECTORY_ENTRIES_MAX)]
    """Peer ids of nodes told of before that cannot be reached, or whose time is over."""
