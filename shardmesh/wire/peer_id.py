"""Peer ids: what libp2p calls a node, derived from its Ed25519 key and nothing else.

A peer id is the identity multihash of the key in libp2p's protobuf, in base58 (libp2p's
specification of peer ids), so the key can be taken out of it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from shardmesh.errors import InputError, ProtocolError

PUBLIC_KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64

_ALPHABET: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_VALUES: Final = {letter: value for value, letter in enumerate(_ALPHABET)}
_KEY_HEADER: Final = bytes((0x08, 0x01, 0x12, PUBLIC_KEY_BYTES))
"""Protobuf: field 1, key type 1 (Ed25519); field 2, 32 bytes."""
_HEADER: Final = bytes((0x00, len(_KEY_HEADER) + PUBLIC_KEY_BYTES)) + _KEY_HEADER
"""Multihash: function 0 (identity), length, then the protobuf."""
_TEXT_LENGTH: Final = 52


def peer_id_of(public_key: bytes) -> str:
    """The peer id, like `12D3KooW...`, of a raw Ed25519 public key of 32 bytes."""
    if len(public_key) != PUBLIC_KEY_BYTES:
        raise ProtocolError(f"an Ed25519 key has {PUBLIC_KEY_BYTES} bytes, not {len(public_key)}")
    return _base58(_HEADER + public_key)


def public_key_of(peer_id: str) -> bytes:
    """The raw Ed25519 public key inside a peer id; ProtocolError (theirs) if it is none."""
    if len(peer_id) != _TEXT_LENGTH or any(letter not in _VALUES for letter in peer_id):
        raise ProtocolError(f"not a peer id of an Ed25519 key: {peer_id[:_TEXT_LENGTH]!r}")
    raw = _unbase58(peer_id)
    if len(raw) != len(_HEADER) + PUBLIC_KEY_BYTES or not raw.startswith(_HEADER):
        raise ProtocolError(f"not a peer id of an Ed25519 key: {peer_id!r}")
    return raw[len(_HEADER) :]


def is_peer_id(text: str) -> bool:
    """Whether the text is the peer id of some Ed25519 key."""
    try:
        public_key_of(text)
    except ProtocolError:
        return False
    return True


def matching_peer(
    text: str,
    known: Sequence[str],
    *,
    one: str = "node in this mesh",
    several: str = "nodes in this mesh",
) -> str:
    """The one known peer id that begins or ends with `text`; InputError (theirs) otherwise.

    `one` and `several` say for a person who is known.
    """
    found = [peer_id for peer_id in known if peer_id.startswith(text) or peer_id.endswith(text)]
    if len(found) == 1:
        return found[0]
    who = f"{len(found)} {several} have" if found else f"no {one} has"
    raise InputError(
        f"{who} a peer id that begins or ends with {text!r}",
        code="UNKNOWN_PEER",
        next_step="`shardmesh status` shows the ends of the peer ids",
    )


def verify_signature(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """Whether the owner of the raw Ed25519 key signed the data."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def _base58(data: bytes) -> str:
    number = int.from_bytes(data, "big")
    letters = []
    while number:
        number, value = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[value])
    n_zeros = len(data) - len(data.lstrip(b"\0"))
    return _ALPHABET[0] * n_zeros + "".join(reversed(letters))


def _unbase58(text: str) -> bytes:
    number = 0
    for letter in text:
        number = number * len(_ALPHABET) + _VALUES[letter]
    n_zeros = len(text) - len(text.lstrip(_ALPHABET[0]))
    return b"\0" * n_zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")
