"""Links over libp2p streams, for data processes that cannot reach each other.

The control process owns libp2p and the data process the link.  So the dialing data process connects
to a port of its own control process on loopback, names the link, and the control process carries
the bytes into a libp2p stream; the other control process carries them to the data port of its own
data process.  Both only see sealed records: the keys are where they were, in the link's two ends.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from shardmesh.errors import BusyError, ShardmeshError, UnreachableError
from shardmesh.swarm.host import Host
from shardmesh.swarm.pump import pump
from shardmesh.swarm.streams import ByteStream
from shardmesh.wire.limits import (
    EXPECTED_LINKS_MAX,
    HANDSHAKE_TIMEOUT_S,
    LASTING_STREAMS_MAX,
    LINK_AGREEMENT_BYTES_MAX,
    UNNAMED_CONNECTIONS_MAX,
)
from shardmesh.wire.link_agreement import (
    LINK_PROTOCOL,
    LINK_STREAM_PROTOCOL,
    Endpoint,
    LinkGrant,
    LinkRequester,
)
from shardmesh.wire.sealing import LINK_ID_BYTES

_log = logging.getLogger(__name__)

AGREE_TIMEOUT_S = 10.0
LOOPBACK = "127.0.0.1"
_EXPECTED_LIFETIME_S = 2 * HANDSHAKE_TIMEOUT_S
_BROKEN = (ShardmeshError, OSError, trio.BrokenResourceError, trio.TooSlowError)


@dataclasses.dataclass(frozen=True)
class _Expected:
    peer_id: str
    until_s: float


class LinkStreams:
    """The dialing side's port on loopback; made by `open_link_streams`."""

    def __init__(self, host: Host, port: int, *, is_direct_allowed: bool) -> None:
        self._host = host
        self._endpoint = Endpoint(host=LOOPBACK, port=port)
        self._is_direct_allowed = is_direct_allowed
        self._expected: dict[bytes, _Expected] = {}
        self._n_unnamed = 0
        self._n_carried = 0

    async def agree(self, peer_id: str, addresses: tuple[str, ...]) -> LinkGrant:
        """Asks another node for a link to its data process, to be dialed directly or through here.

        Raises its refusal, or UnreachableError (the moment's).
        """
        if addresses:
            self._host.learn(peer_id, addresses)
        requester = LinkRequester(self._host.peer_id, peer_id)
        answer = await self._host.request(
            peer_id,
            LINK_PROTOCOL,
            requester.request(),
            timeout_s=AGREE_TIMEOUT_S,
            response_bytes_max=LINK_AGREEMENT_BYTES_MAX,
        )
        grant = requester.grant(answer)
        stream = self.expect(grant.link_id, peer_id)
        endpoints = grant.endpoints if self._is_direct_allowed else ()
        return dataclasses.replace(grant, endpoints=endpoints, stream=stream)

    def expect(self, link_id: bytes, peer_id: str) -> Endpoint:
        """Where on this machine this link leads to that node, once and within ten seconds.

        Raises BusyError (the moment's) when too many are expected already.
        """
        now_s = trio.current_time()
        self._expected = {k: e for k, e in self._expected.items() if e.until_s > now_s}
        if len(self._expected) >= EXPECTED_LINKS_MAX:
            raise BusyError("too many links are being set up")
        self._expected[link_id] = _Expected(peer_id, now_s + _EXPECTED_LIFETIME_S)
        return self._endpoint

    async def handle(self, near: trio.SocketStream) -> None:
        """Serves one connection from the own data process to its end."""
        if self._n_unnamed >= UNNAMED_CONNECTIONS_MAX or self._n_carried >= LASTING_STREAMS_MAX:
            await trio.aclose_forcefully(near)
            return
        self._n_unnamed += 1
        far: ByteStream | None = None
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT_S):
                far = await self._named(near)
        except _BROKEN as error:
            _log.info("a link over a stream did not come up: %s", error)
            await trio.aclose_forcefully(near)
            return
        finally:
            self._n_unnamed -= 1
        self._n_carried += 1
        try:
            await pump(near, far)
            await far.aclose()
        finally:
            self._n_carried -= 1
            far.abort()
            await trio.aclose_forcefully(near)

    async def _named(self, near: trio.SocketStream) -> ByteStream:
        """Reads the link's name and opens the stream to the node that offered the link."""
        link_id = b""
        while len(link_id) < LINK_ID_BYTES:
            data = await near.receive_some(LINK_ID_BYTES - len(link_id))
            if not data:
                raise UnreachableError("the connection ended before it named a link")
            link_id += data
        expected = self._expected.pop(link_id, None)
        if expected is None or expected.until_s < trio.current_time():
            raise UnreachableError("the connection names no link that was agreed on")
        far = await self._host.open_stream(expected.peer_id, LINK_STREAM_PROTOCOL)
        try:
            await far.send_all(link_id)
        except BaseException:
            far.abort()
            raise
        return far


@asynccontextmanager
async def open_link_streams(
    host: Host, *, is_direct_allowed: bool = True
) -> AsyncIterator[LinkStreams]:
    """Agreement on links, with a way over libp2p streams until the block is left."""
    (listener,) = await trio.open_tcp_listeners(0, host=LOOPBACK)
    port = listener.socket.getsockname()[1]
    streams = LinkStreams(host, port, is_direct_allowed=is_direct_allowed)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, streams.handle, [listener])
        try:
            yield streams
        finally:
            nursery.cancel_scope.cancel()


async def carry_to_data_port(stream: ByteStream, endpoint: Endpoint) -> None:
    """The accepting side: carries a stream to the own data process, which checks what comes.

    Raises UnreachableError (the moment's) if the data process does not listen.
    """
    try:
        with trio.fail_after(HANDSHAKE_TIMEOUT_S):
            near = await trio.open_tcp_stream(endpoint.host, endpoint.port)
    except (OSError, trio.TooSlowError) as error:
        raise UnreachableError(
            "the data process of this node takes no links now", code="NOT_LOADED"
        ) from error
    try:
        await pump(stream, near)
    finally:
        await trio.aclose_forcefully(near)
