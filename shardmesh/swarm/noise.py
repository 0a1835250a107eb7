"""The handshake of a private mesh: Noise with the cluster's secret mixed in.

`Noise_XXpsk0_25519_ChaChaPoly_SHA256` (The Noise Protocol Framework, revision 34, section 9): the
secret goes into the keys before the first message, so a stranger's first message does not open,
and it is turned away before either side has shown who it is.  Whoever gets through has proven
the secret for this very connection and for both keys that the peer ids are made of.  Strangers
who record or replay it learn nothing.

The private handshake has a protocol name of its own.  So a node without a secret is told at once
that it needs one, and one with another secret by a message of no bytes, which Noise never sends.
After the handshake the accepting side sends one byte: whether its lists admit the other one.
"""

from __future__ import annotations

from typing import Final, cast

from cryptography.exceptions import InvalidTag
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.crypto.keys import KeyPair, PrivateKey
from libp2p.custom_types import TProtocol
from libp2p.io.abc import ReadWriteCloser
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.security.noise.io import NoisePacketReadWriter
from libp2p.security.noise.patterns import IPattern, PatternXX
from libp2p.security.noise.transport import PROTOCOL_ID as PUBLIC_PROTOCOL
from libp2p.security.noise.transport import Transport
from libp2p.security.secure_session import SecureSession
from noise.connection import NoiseConnection
from noise.exceptions import NoiseValueError

from shardmesh.errors import RefusedError
from shardmesh.swarm.admission import (
    Admission,
    not_admitted,
    private_mesh,
    public_mesh,
    wrong_secret,
)

PRIVATE_PROTOCOL: Final = TProtocol("/shardmesh/private-noise/1.0")
_NAME: Final = b"Noise_XXpsk0_25519_ChaChaPoly_SHA256"
_REFUSAL: Final = b""
_ADMITTED: Final = b"\x01"
_DENIED: Final = b"\x00"


class NotAdmitted(SwarmException):
    """A connection that one side did not want; `refusal` is what to tell a person."""

    def __init__(self, refusal: RefusedError) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class AdmittingNoise(Transport):
    """libp2p's Noise, which lets in whom the admission lets in; private if that has a secret."""

    def __init__(self, key_pair: KeyPair, noise_key: PrivateKey, admission: Admission) -> None:
        super().__init__(key_pair, noise_privkey=noise_key)
        self.admission = admission
        self.protocol = PUBLIC_PROTOCOL if admission.is_public else PRIVATE_PROTOCOL

    def get_pattern(self) -> IPattern:
        return _Pattern(self.local_peer, self.libp2p_privkey, self.noise_privkey, self.admission)

    def nothing_in_common(self) -> NotAdmitted:
        """What it means that the other side does not know `protocol`."""
        return NotAdmitted(private_mesh() if self.admission.is_public else public_mesh())


class _Pattern(PatternXX):
    """One handshake."""

    def __init__(
        self, local_peer: ID, key: PrivateKey, noise_key: PrivateKey, admission: Admission
    ) -> None:
        super().__init__(local_peer, key, noise_key)
        self._admission = admission
        self._secret = admission.secret
        if self._secret is not None:
            self.protocol_name = _NAME

    def create_noise_state(self, prologue: bytes | None = None) -> NoiseConnection:
        state = super().create_noise_state(prologue)
        if self._secret is not None:
            state.set_psks(self._secret.admission_key())
        return state

    async def handshake_inbound(self, conn: IRawConnection) -> ISecureConn:
        if self._secret is None:
            return self._held_against_lists(await super().handshake_inbound(conn))
        try:
            session = await super().handshake_inbound(conn)
        except InvalidTag as error:
            self._admission.n_refused["WRONG_SECRET"] += 1
            await NoisePacketReadWriter(cast(ReadWriteCloser, conn)).write_msg(_REFUSAL)
            raise NotAdmitted(wrong_secret()) from error
        is_admitted = self._admission.admits(str(session.get_remote_peer()))
        if not is_admitted:
            self._admission.n_refused["NOT_ADMITTED"] += 1
        await cast(SecureSession, session).conn.write_msg(_ADMITTED if is_admitted else _DENIED)
        self._admission.note_proven()
        return self._held_against_lists(session)

    async def handshake_outbound(self, conn: IRawConnection, remote_peer: ID | None) -> ISecureConn:
        if self._secret is None:
            return self._held_against_lists(await super().handshake_outbound(conn, remote_peer))
        try:
            session = await super().handshake_outbound(conn, remote_peer)
        except (InvalidTag, NoiseValueError) as error:  # the refusal is no message of Noise
            self._admission.note_refused()
            raise NotAdmitted(wrong_secret()) from error
        self._admission.note_proven()
        if await cast(SecureSession, session).conn.read_msg() != _ADMITTED:
            raise NotAdmitted(not_admitted())
        return self._held_against_lists(session)

    def _held_against_lists(self, session: ISecureConn) -> ISecureConn:
        if not self._admission.admits(str(session.get_remote_peer())):
            raise NotAdmitted(not_admitted())
        return session
