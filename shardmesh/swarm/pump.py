"""Carrying bytes between two streams, both ways, without looking at them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from shardmesh.errors import ShardmeshError

_ENDED = (ShardmeshError, trio.BrokenResourceError, trio.ClosedResourceError, OSError)


class Flow(Protocol):
    """What a ByteStream and trio's SocketStream have in common."""

    async def receive_some(self) -> bytes | bytearray: ...

    async def send_all(self, data: bytes) -> None: ...


Toll = Callable[[int], Awaitable[None]]
"""Waits until so many bytes may go on."""


async def pump(one: Flow, other: Flow, *, before_sending: Toll | None = None) -> None:
    """Carries bytes both ways until either stream ends or breaks; the caller closes both.

    What one end has sent before its own end is handed on.  A cancellation stops it at once.
    """
    async with trio.open_nursery() as nursery:

        async def carry(source: Flow, target: Flow) -> None:
            try:
                while data := await source.receive_some():
                    if before_sending is not None:
                        await before_sending(len(data))
                    await target.send_all(bytes(data))
            except _ENDED:
                pass  # an end like any other: both streams go, and their users see that
            nursery.cancel_scope.cancel()

        nursery.start_soon(carry, one, other)
        nursery.start_soon(carry, other, one)
