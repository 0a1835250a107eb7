"""Passing bytes on to nodes that cannot be reached, and being reached that way.

A relay never dials: it only opens streams on connections that nodes with a place keep to it.  What
it carries is a whole connection between the two ends, with the handshake of any other connection,
so the relay can neither read nor change it, and a private mesh's secret is proven end to end.
py-libp2p's own relay is not used; docs/architecture.md says why.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from typing import TYPE_CHECKING, cast

import trio
from libp2p.connection_types import ConnectionType
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from multiaddr import Multiaddr

from shardmesh.errors import (
    BusyError,
    ProtocolError,
    RefusedError,
    ShardmeshError,
    UnreachableError,
)
from shardmesh.swarm.pump import pump
from shardmesh.swarm.streams import ByteStream, receive_message, send_message
from shardmesh.wire.codec import decode_cbor, encode_cbor
from shardmesh.wire.limits import (
    COMMAND_TIMEOUT_S,
    RELAY_ADDRESSES_MAX,
    RELAY_BYTES_PER_S_MAX,
    RELAY_CIRCUITS_MAX,
    RELAY_CIRCUITS_PER_NODE_MAX,
    RELAY_MESSAGE_BYTES_MAX,
    RELAY_RESERVATION_S,
    RELAY_RESERVATIONS_MAX,
    REQUEST_READ_TIMEOUT_S,
)
from shardmesh.wire.relay import (
    RELAY_PROTOCOL,
    RELAYED_PROTOCOL,
    Call,
    Carried,
    RelayAnswer,
    RelayRequest,
    Reserve,
    Reserved,
    refusal_of,
)

if TYPE_CHECKING:
    from shardmesh.swarm.host import Host

_log = logging.getLogger(__name__)


class Relay:
    """The relay's side; serves from the call of `serve` until the host ends."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._reserved_until_s: dict[str, float] = {}
        self._n_circuits: Counter[str] = Counter()  # by node, at either end
        self.n_circuits = 0

    def serve(self) -> None:
        """From now on members may take a place and be called through this node."""
        self._host.serve(RELAY_PROTOCOL, self._serve, lasting=True)

    @property
    def n_reservations(self) -> int:
        self._forget_gone()
        return len(self._reserved_until_s)

    async def _serve(self, stream: ByteStream, peer_id: str) -> None:
        with trio.fail_after(REQUEST_READ_TIMEOUT_S):
            data = await receive_message(stream, RELAY_MESSAGE_BYTES_MAX)
        request: RelayRequest = decode_cbor(data, RelayRequest)  # type: ignore[arg-type]
        try:
            if self._host.observed_host(peer_id) is None:
                raise RefusedError("a relay is asked over a direct connection only")
            if isinstance(request, Reserve):
                answer = self._reserve(peer_id)
                await send_message(stream, encode_cbor(answer))
                return
            self._check_call(peer_id, request.peer_id)
        except ShardmeshError as error:
            await send_message(stream, encode_cbor(refusal_of(error)))
            return
        await self._carry(stream, peer_id, request.peer_id)

    def _reserve(self, peer_id: str) -> Reserved:
        self._forget_gone()
        places = self._reserved_until_s
        if peer_id not in places and len(places) >= RELAY_RESERVATIONS_MAX:
            raise BusyError("this relay has no place left")
        places[peer_id] = trio.current_time() + RELAY_RESERVATION_S
        own = tuple(self._host.direct_addresses()[:RELAY_ADDRESSES_MAX])
        return Reserved(lifetime_s=RELAY_RESERVATION_S, addresses=own)

    def _forget_gone(self) -> None:
        """A place is held by a connection, and never for longer than it was given."""
        now_s = trio.current_time()
        self._reserved_until_s = {
            peer_id: until_s
            for peer_id, until_s in self._reserved_until_s.items()
            if until_s > now_s and self._host.observed_host(peer_id) is not None
        }

    def _check_call(self, caller: str, called: str) -> None:
        self._forget_gone()
        if called not in self._reserved_until_s:
            raise UnreachableError("the node has no place on this relay")
        if (
            self.n_circuits >= RELAY_CIRCUITS_MAX
            or self._n_circuits[caller] >= RELAY_CIRCUITS_PER_NODE_MAX
            or self._n_circuits[called] >= RELAY_CIRCUITS_PER_NODE_MAX
        ):
            raise BusyError("this relay carries as many connections as it may")

    async def _carry(self, near: ByteStream, caller: str, called: str) -> None:
        self._count(caller, called, 1)
        far: ByteStream | None = None
        try:
            try:
                far = await self._host.open_stream(called, RELAYED_PROTOCOL)
            except ShardmeshError as error:
                await send_message(near, encode_cbor(refusal_of(error)))
                return
            await send_message(near, encode_cbor(Carried()))
            await pump(near, far, before_sending=Pace(RELAY_BYTES_PER_S_MAX))
            await far.aclose()
        finally:
            self._count(caller, called, -1)
            if far is not None:
                far.abort()

    def _count(self, caller: str, called: str, n: int) -> None:
        self.n_circuits += n
        for peer_id in (caller, called):
            self._n_circuits[peer_id] += n
            if not self._n_circuits[peer_id]:
                del self._n_circuits[peer_id]


class Pace:
    """Lets so many bytes a second pass, and as many at once after a pause."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._paid_until_s = -math.inf

    async def __call__(self, n_bytes: int) -> None:
        now_s = trio.current_time()
        self._paid_until_s = max(self._paid_until_s, now_s - 1) + n_bytes / self._bytes_per_s
        if self._paid_until_s > now_s:
            await trio.sleep(self._paid_until_s - now_s)


# -- the ends ----------------------------------------------------------------------------------


async def reserve(host: Host, relay_id: str) -> Reserved:
    """Takes a place on a relay, or keeps it.

    Raises its refusal, RefusedError (UNKNOWN_PROTOCOL) if it is no relay, UnreachableError.
    """
    answer = await host.request(
        relay_id,
        RELAY_PROTOCOL,
        encode_cbor(Reserve()),
        timeout_s=COMMAND_TIMEOUT_S,
        response_bytes_max=RELAY_MESSAGE_BYTES_MAX,
    )
    message = _answer(answer)
    if not isinstance(message, Reserved):
        raise ProtocolError("the relay did not answer what it was asked")
    return message


async def call(host: Host, relay_id: str, peer_id: str) -> RawConnection:
    """A connection to a node through a relay, on which the handshake is still to be made.

    Raises the relay's refusal or UnreachableError (the moment's); nothing is left then.
    """
    stream = await host.open_stream(relay_id, RELAY_PROTOCOL)
    try:
        await send_message(stream, encode_cbor(Call(peer_id=peer_id)))
        message = _answer(await receive_message(stream, RELAY_MESSAGE_BYTES_MAX))
        if not isinstance(message, Carried):
            raise ProtocolError("the relay did not answer what it was asked")
    except BaseException:
        stream.abort()
        raise
    return relayed_connection(stream, relay_id, is_dialer=True)


def _answer(data: bytes) -> Reserved | Carried:
    message: RelayAnswer = decode_cbor(data, RelayAnswer)  # type: ignore[arg-type]
    if isinstance(message, Reserved | Carried):
        return message
    raise message.error()


def relayed_connection(stream: ByteStream, relay_id: str, *, is_dialer: bool) -> RawConnection:
    """A stream that a relay carries, as libp2p wants a connection."""
    where = Multiaddr(f"/p2p/{relay_id}/p2p-circuit")
    carried = cast(ReadWriteCloser, _CarriedStream(stream))
    return RawConnection(carried, is_dialer, ConnectionType.RELAYED, [where])


class _CarriedStream:
    """A ByteStream with the names and the errors of libp2p's connections."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._rest = b""

    async def read(self, n: int | None = None) -> bytes:
        if not self._rest:
            try:
                self._rest = await self._stream.receive_some()
            except UnreachableError as error:
                raise ConnectionClosedError(str(error)) from error
        n = len(self._rest) if n is None else n
        data, self._rest = self._rest[:n], self._rest[n:]
        return data

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except UnreachableError as error:
            raise ConnectionClosedError(str(error)) from error

    async def close(self) -> None:
        await self._stream.aclose()

    def get_remote_address(self) -> None:
        """There is none: the relay's would be taken for the node's."""
        return
