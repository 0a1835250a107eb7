"""Serving the streams that others open: a task for each, a bound on all, no error into libp2p."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol

from shardmesh.errors import MomentError, RefusedError, ShardmeshError, carried_past
from shardmesh.swarm.streams import ByteStream, Libp2pStream, send_message
from shardmesh.swarm.transport import MeshHost
from shardmesh.wire.limits import LASTING_STREAMS_MAX, REQUESTS_MAX, REQUESTS_PER_NODE_MAX

Handler = Callable[[ByteStream, str], Awaitable[None]]
"""Serves one stream; is given the peer id of the other side, which libp2p has proven."""

_log = logging.getLogger(__name__)


class Serving:
    """The protocols that a host serves."""

    def __init__(self, libp2p: MeshHost, nursery: trio.Nursery) -> None:
        self._libp2p = libp2p
        self._nursery = nursery
        self._requests = Places(REQUESTS_MAX)
        self._lasting = Places(LASTING_STREAMS_MAX)

    def serve(self, protocol: str, handler: Handler, *, busy: bytes | None, lasting: bool) -> None:
        """Serves a protocol: each stream gets a task of its own.

        A handler that raises loses its stream only.  It is cancelled when the other side resets
        the stream.  When too many are at work, `busy` is sent as a message, or the stream reset.
        Streams that stay open (`lasting`) are counted by themselves, so that they take no room
        from requests.
        """
        places = self._lasting if lasting else self._requests

        async def serve_stream(libp2p_stream: INetStream) -> None:
            peer_id = str(libp2p_stream.muxed_conn.peer_id)
            stream = Libp2pStream(libp2p_stream, self._nursery)
            try:
                if places.take(peer_id):
                    try:
                        await _run_handler(handler, stream, peer_id)
                    finally:
                        places.give_back(peer_id)
                elif busy is not None:
                    await send_message(stream, busy)
                await stream.aclose()
            except ShardmeshError as error:
                is_usual = isinstance(error, MomentError | RefusedError)
                level = logging.DEBUG if is_usual else logging.INFO
                _log.log(level, "%s from %s: %s [%s]", protocol, peer_id, error, error.code)
            except trio.TooSlowError:
                _log.debug("%s from %s: not over in time", protocol, peer_id)
            except Exception:  # noqa: BLE001 - raised into libp2p, it would end the whole host
                _log.exception("the handler of %s failed", protocol)
            finally:
                stream.abort()

        self._libp2p.set_stream_handler(TProtocol(protocol), serve_stream)


class Places:
    """How many streams are served at once, in all and for each node."""

    def __init__(self, n_max: int) -> None:
        self._n_max = n_max
        self._n_taken: dict[str, int] = {}

    def take(self, peer_id: str) -> bool:
        n_here = self._n_taken.get(peer_id, 0)
        if n_here >= REQUESTS_PER_NODE_MAX or sum(self._n_taken.values()) >= self._n_max:
            _log.warning("too many requests at once; one of %s is refused", peer_id)
            return False
        self._n_taken[peer_id] = n_here + 1
        return True

    def give_back(self, peer_id: str) -> None:
        self._n_taken[peer_id] -= 1
        if not self._n_taken[peer_id]:
            del self._n_taken[peer_id]


async def _run_handler(handler: Handler, stream: Libp2pStream, peer_id: str) -> None:
    """Runs the handler until it is done or the stream breaks; raises what it raises."""

    async def end_with(stream: Libp2pStream, scope: trio.CancelScope) -> None:
        await stream.broken.wait()
        scope.cancel()

    with carried_past() as block:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end_with, stream, nursery.cancel_scope)
            with block():
                await handler(stream, peer_id)
            nursery.cancel_scope.cancel()
