"""What somebody has signed: a body, the signer's key, and the signature over a domain and the body.

The domain is a string of its own for each kind of body: what is signed as one is not as another.
"""

from __future__ import annotations

from typing import Annotated, Protocol

import msgspec

from shardmesh.errors import ProtocolError
from shardmesh.wire.codec import decode_cbor, encode_cbor
from shardmesh.wire.peer_id import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, verify_signature


class Signer(Protocol):
    """Whoever owns an Ed25519 key."""

    @property
    def public_key(self) -> bytes: ...

    def sign(self, data: bytes) -> bytes: ...


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A body with a signature that was not looked at yet: see `is_signed_as`."""

    public_key: Annotated[
        bytes, msgspec.Meta(min_length=PUBLIC_KEY_BYTES, max_length=PUBLIC_KEY_BYTES)
    ]
    signature: Annotated[
        bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)
    ]
    body: bytes

    def is_signed_as(self, domain: bytes) -> bool:
        """Whether the owner of the key has signed the body for this domain."""
        return verify_signature(self.public_key, self.signature, domain + self.body)


def sign_body(body: bytes, domain: bytes, signer: Signer) -> bytes:
    """The CBOR of an envelope with the body."""
    signature = signer.sign(domain + body)
    return encode_cbor(Envelope(public_key=signer.public_key, signature=signature, body=body))


def open_envelope(data: bytes, n_bytes_max: int, what: str) -> Envelope:
    """The envelope in these bytes, which are `what`, as in "an update".

    Raises ProtocolError (theirs): TOO_LARGE, or BAD_CBOR and BAD_MESSAGE for what is no envelope.
    """
    if len(data) > n_bytes_max:
        raise ProtocolError(f"{what} of {len(data)} bytes", code="TOO_LARGE")
    return decode_cbor(data, Envelope)
