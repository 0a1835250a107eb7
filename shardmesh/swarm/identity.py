"""The key of a node: made on its first run, kept, and the same ever after."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from shardmesh.errors import InputError
from shardmesh.swarm.state_file import write_state
from shardmesh.wire.peer_id import peer_id_of, verify_signature

__all__ = ["Identity", "load_identity", "new_identity", "peer_id_of", "verify_signature"]

_KEY_FILE_BYTES_MAX: Final = 4096


class Identity:
    """An Ed25519 key pair and the peer id that follows from it."""

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self._private_key = private_key
        self.public_key: bytes = private_key.public_key().public_bytes_raw()
        self.peer_id = peer_id_of(self.public_key)

    def sign(self, data: bytes) -> bytes:
        """An Ed25519 signature of 64 bytes."""
        return self._private_key.sign(data)

    def secret(self) -> bytes:
        """The 32 secret bytes, for libp2p's handshake and for nothing else."""
        return self._private_key.private_bytes_raw()

    def derive_secret(self, purpose: str) -> bytes:
        """32 bytes that only this identity can make, others for each purpose."""
        kdf = HKDF(hashes.SHA256(), length=32, salt=None, info=f"shardmesh {purpose}".encode())
        return kdf.derive(self.secret())

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"


def new_identity() -> Identity:
    """A fresh identity that is kept nowhere."""
    return Identity(Ed25519PrivateKey.generate())


def load_identity(path: Path) -> Identity:
    """The identity kept in a PEM file, which is made if it is missing (mode 0600, atomically).

    Raises InputError (theirs) if the file is no Ed25519 key or others may read it, StorageError
    (ours) if it cannot be written.
    """
    if not path.exists():
        pem = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_state(path, pem, replace=False)  # whoever came first has made the identity
    return Identity(_read_key(path))


def _read_key(path: Path) -> Ed25519PrivateKey:
    next_step = f"Restore {path} from a copy, or move it away to get a new identity."
    try:
        mode = path.stat().st_mode & 0o077
        with path.open("rb") as file:
            pem = file.read(_KEY_FILE_BYTES_MAX)
        key = serialization.load_pem_private_key(pem, password=None)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path} cannot be read: {reason}", next_step=next_step) from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not a private key", next_step=next_step) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path} is not an Ed25519 key", next_step=next_step)
    if mode:
        raise InputError(
            f"{path} holds a private key that other users of this machine may read or change",
            next_step=f"chmod 600 {path}",
        )
    return key
