"""Keys of a link and the sealing of its frames.

The two control processes exchange X25519 public keys inside a libp2p stream, which Noise has
already authenticated and encrypted.  From the shared secret HKDF-SHA256 (RFC 5869) makes one
AES-256-GCM key and one IV for each direction; the nonce of record n is the IV xor n, as in TLS 1.3
(RFC 8446 section 5.3).  A record that is lost, doubled, reordered or altered does not open, and
the link ends.
"""

from __future__ import annotations

import dataclasses
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from shardmesh.errors import ProtocolError

LINK_ID_BYTES = 16
KEY_BYTES = 32
IV_BYTES = 12
PUBLIC_KEY_BYTES = 32
_DOMAIN = b"shardmesh link v1\x00"


@dataclasses.dataclass(frozen=True)
class DirectionKey:
    """Key and IV of one direction of a link; never shown by repr."""

    key: bytes = dataclasses.field(repr=False)
    iv: bytes = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class LinkKeys:
    """Both directions, seen from the side that opened the connection."""

    dialer_to_acceptor: DirectionKey
    acceptor_to_dialer: DirectionKey


class KeyExchange:
    """One side's part in agreeing on the keys of one link; used once."""

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()

    @property
    def public_key(self) -> bytes:
        """32 bytes to send to the other side."""
        return self._private.public_key().public_bytes_raw()

    def agree(
        self, other_public_key: bytes, *, link_id: bytes, dialer: str, acceptor: str
    ) -> LinkKeys:
        """The keys, bound to the link's id and to both peer ids.

        Raises ProtocolError (theirs) for a public key that is none or that forces the secret.
        """
        try:
            secret = self._private.exchange(X25519PublicKey.from_public_bytes(other_public_key))
        except ValueError as error:
            raise ProtocolError("the other side's key is not usable", code="BAD_KEY") from error
        info = _DOMAIN + dialer.encode() + b"\x00" + acceptor.encode()
        n_direction = KEY_BYTES + IV_BYTES
        stream = HKDF(hashes.SHA256(), 2 * n_direction, salt=link_id, info=info).derive(secret)
        return LinkKeys(_direction(stream[:n_direction]), _direction(stream[n_direction:]))


def new_link_id() -> bytes:
    """16 random bytes that name a link before its first sealed record."""
    return secrets.token_bytes(LINK_ID_BYTES)


class Sealer:
    """Seals the records of one direction, in order."""

    def __init__(self, direction: DirectionKey) -> None:
        self._cipher = AESGCM(direction.key)
        self._nonces = _NonceCounter(direction.iv)

    def seal(self, frame: bytes) -> bytes:
        """Ciphertext and tag, 16 bytes longer than `frame`."""
        return self._cipher.encrypt(self._nonces.next(), frame, None)


class Opener:
    """Opens the records of one direction, in order."""

    def __init__(self, direction: DirectionKey) -> None:
        self._cipher = AESGCM(direction.key)
        self._nonces = _NonceCounter(direction.iv)

    def open(self, sealed: bytes) -> bytes:
        """The frame; raises ProtocolError (theirs) if it is not the next one that was sealed."""
        try:
            return self._cipher.decrypt(self._nonces.next(), sealed, None)
        except (InvalidTag, ValueError) as error:
            raise ProtocolError(
                "a record does not open with this link's key", code="BAD_SEAL"
            ) from error


class _NonceCounter:
    def __init__(self, iv: bytes) -> None:
        self._iv = int.from_bytes(iv, "big")
        self._n_used = 0

    def next(self) -> bytes:
        # 2**64 records would take longer than any link lives; no re-keying is needed.
        nonce = (self._iv ^ self._n_used).to_bytes(IV_BYTES, "big")
        self._n_used += 1
        return nonce


def _direction(stream: bytes) -> DirectionKey:
    return DirectionKey(stream[:KEY_BYTES], stream[KEY_BYTES:])
