"""What the members of a private mesh have in common, as text and as a key.

`sm1_` and the base64url form of 52 bytes: 32 random ones, the first 16 of the SHA-256 of the
owner's public key, and 4 that tell a mistyped secret from a wrong one.  It is random and never a
word that somebody chose: one recorded handshake is enough to try words against.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import secrets
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from shardmesh.errors import InputError

SECRET_BYTES: Final = 32
OWNER_BYTES: Final = 16
_PREFIX: Final = "sm1_"
_CHECK_BYTES: Final = 4
_DOMAIN: Final = b"shardmesh admission 1"


@dataclasses.dataclass(frozen=True)
class ClusterSecret:
    """The secret of a cluster and who may change it; never shown by repr."""

    secret: bytes = dataclasses.field(repr=False)
    owner: bytes  # the beginning of the SHA-256 of the owner's public key

    def text(self) -> str:
        """What people hand to each other."""
        data = self.secret + self.owner
        encoded = base64.urlsafe_b64encode(data + _check(data)).decode().rstrip("=")
        return _PREFIX + encoded

    def admission_key(self) -> bytes:
        """The 32 bytes that the handshake of two members is mixed with (RFC 5869)."""
        return HKDF(hashes.SHA256(), SECRET_BYTES, salt=None, info=_DOMAIN).derive(self.secret)


def new_secret(owner_public_key: bytes) -> ClusterSecret:
    """A fresh random secret of a cluster with this owner."""
    return ClusterSecret(secrets.token_bytes(SECRET_BYTES), owner_of(owner_public_key))


def owner_of(public_key: bytes) -> bytes:
    """How a secret names its owner: 16 bytes, for which nobody finds a second key."""
    return hashlib.sha256(public_key).digest()[:OWNER_BYTES]


def parse_secret(text: str) -> ClusterSecret:
    """The secret in its text; InputError (theirs) for what is none, which is not repeated."""
    encoded = text.strip().removeprefix(_PREFIX)
    try:
        padded = encoded + "=" * (-len(encoded) % 4)
        data = base64.b64decode(padded, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        data = b""
    body, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
    is_whole = len(body) == SECRET_BYTES + OWNER_BYTES and check == _check(body)
    made = ClusterSecret(body[:SECRET_BYTES], body[SECRET_BYTES:])
    if not is_whole or made.text() != text.strip():  # the last letter has bits that say nothing
        raise InputError(
            "what was given as the secret of the cluster is none, or not all of it",
            code="BAD_SECRET",
            next_step=f"copy it whole, as `shardmesh bootstrap` printed it; it begins {_PREFIX}",
        )
    return made


def _check(data: bytes) -> bytes:
    return hashlib.sha256(_DOMAIN + data).digest()[:_CHECK_BYTES]
