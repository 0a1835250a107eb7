"""HTTP/1.1 as Hypercorn speaks it, without HTTP/2, and with an eye on who sends requests ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import trio
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.h11 import H11Protocol

READ_AHEAD_BYTES_MAX: Final = 64 * 1024
"""Of requests behind one that is being answered; the rest waits in the system."""


class _OnlyHttp1(H11Protocol):
    """HTTP/1.1 and WebSockets.

    Hypercorn's HTTP/2 keeps whole answers in memory for a client that does not take them, a hundred
    at once over one connection, and for as long as that client likes.
    """

    can_read: _AnswerUnderWay  # type: ignore[assignment]

    async def _check_protocol(self, event: Any) -> None:
        """Passes over any wish to speak HTTP/2."""


def only_http_1(made: ProtocolWrapper, stream: trio.SocketStream) -> _OnlyHttp1:
    """In the place of the protocol that was made for this connection."""
    protocol = _OnlyHttp1(
        made.app,
        made.config,
        made.context,
        made.task_group,
        made.state,
        made.ssl,
        made.client,
        made.server,
        made.send,
    )
    protocol.can_read = _AnswerUnderWay(
        stream, on_data=lambda data: protocol.connection.receive_data(data)
    )
    return protocol


class GoneError(Exception):
    """The client has ended the connection while it was owed an answer."""


class _AnswerUnderWay:
    """Waits until the next request of a client may be read that has sent it ahead of an answer.

    In the place of Hypercorn's event, which does not look whether the client is still there.
    """

    def __init__(self, stream: trio.SocketStream, on_data: Callable[[bytes], None]) -> None:
        self._stream = stream
        self._on_data = on_data
        self._is_over = trio.Event()
        self._is_gone = False

    async def clear(self) -> None:
        self._is_over = trio.Event()

    async def set(self) -> None:
        self._is_over.set()

    async def wait(self) -> None:
        """Raises GoneError if the client goes away meanwhile."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_on)
            await self._is_over.wait()
            nursery.cancel_scope.cancel()
        if self._is_gone:
            raise GoneError

    async def _read_on(self) -> None:
        n_bytes = 0
        while n_bytes < READ_AHEAD_BYTES_MAX:
            try:
                data = bytes(await self._stream.receive_some(READ_AHEAD_BYTES_MAX))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if not data:
                self._is_gone = True
                self._is_over.set()
                return
            self._on_data(data)
            n_bytes += len(data)
