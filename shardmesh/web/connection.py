"""One connection to the gateway: Hypercorn's, with as few waits as an answer needs.

While many answers are streamed, each wait for the next turn of the loop lasts some milliseconds.
Hypercorn makes about ten for the smallest answer: for locks that nobody holds, for writes that the
system would take at once, for a task that watches whether the connection is idle.
"""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable

import trio
from hypercorn.events import Closed, RawData
from hypercorn.events import Event as HttpEvent
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.typing import TaskGroup

from shardmesh.web.http_1 import GoneError, only_http_1
from shardmesh.wire.limits import WRITE_TIMEOUT_S


class Connection(TCPServer):
    """Serves one client; nobody is waited for who is gone or does not read."""

    idle_task: IdleWatch  # type: ignore[assignment]
    stream: trio.SocketStream  # type: ignore[assignment]

    async def run(self) -> None:
        self.idle_task = IdleWatch(self.config.keep_alive_timeout)
        self._unsent = bytearray()  # the beginning of it may have been sent
        await super().run()

    async def _read_data(self) -> None:
        self.protocol.protocol = only_http_1(self.protocol, self.stream)
        try:
            await super()._read_data()
        except GoneError:
            await self.protocol.handle(Closed())
        self.idle_task.end()  # else it holds the place of the connection until it is over

    async def _idle_timeout(self) -> None:
        with trio.CancelScope(shield=True):
            await self._initiate_server_close()

    async def protocol_send(self, event: HttpEvent) -> None:
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        try:
            await self._write(event.data)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            await trio.aclose_forcefully(self.stream)
            await self.protocol.handle(Closed())

    async def _write(self, data: bytes) -> None:
        """Hands over what the system takes at once, and waits only if that is not all.

        Cancelled, the rest goes out ahead of what is written next: the client has its beginning.
        """
        self._unsent += data
        if not self.send_lock.locked() and not self._hand_over():
            return
        async with self.send_lock:
            with trio.fail_after(WRITE_TIMEOUT_S):
                while self._hand_over():
                    await trio.lowlevel.wait_writable(self.stream.socket.fileno())

    def _hand_over(self) -> int:
        """Gives the system what it takes at once; how many bytes are left."""
        del self._unsent[: write_at_once(self.stream, self._unsent)]
        return len(self._unsent)


def write_at_once(stream: trio.SocketStream, data: bytes | bytearray) -> int:
    """Bytes that the system has taken; raises BrokenResourceError or ClosedResourceError."""
    if not data:
        return 0
    descriptor = stream.socket.fileno()
    if descriptor < 0:
        raise trio.ClosedResourceError("the connection was closed on this side")
    try:
        return os.write(descriptor, data)
    except BlockingIOError:
        return 0
    except OSError as error:
        raise trio.BrokenResourceError("the other side is gone") from error


class IdleWatch:
    """Ends a connection that nobody uses; one task for all its requests.

    In the place of Hypercorn's, which starts a task for each request.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._timer = trio.CancelScope()
        self._is_started = False
        self._is_over = False

    async def restart(self, tasks: TaskGroup, on_idle: Callable[[], Awaitable[None]]) -> None:
        """The connection is idle from now on."""
        if not self._is_started:
            self._is_started = True
            tasks.spawn(self._run, on_idle)
        self._timer.deadline = trio.current_time() + self._timeout_s

    async def stop(self) -> None:
        """The connection is used."""
        self._timer.deadline = math.inf

    def end(self) -> None:
        """The connection is over."""
        self._is_over = True
        self._timer.cancel()

    async def _run(self, on_idle: Callable[[], Awaitable[None]]) -> None:
        with self._timer:
            await trio.Event().wait()
        if not self._is_over:
            await on_idle()
