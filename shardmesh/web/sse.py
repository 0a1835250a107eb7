"""Answers that come in pieces, and work that ends when nobody waits for it any more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import trio
from fastapi import Request, Response
from starlette.types import Message, Receive, Scope, Send

from shardmesh.errors import ShardmeshError, known_error, ungrouped
from shardmesh.web.errors import body_of, headers_of, status_of

Result = TypeVar("Result")
SendEvent = Callable[[Any], Awaitable[None]]
"""Sends one event: anything that JSON can have, or text as it is."""

_encoder = msgspec.json.Encoder()


class EventStream(Response):
    """Server-sent events from `produce`, which is cancelled when the client goes away.

    The answer begins with the first event, so that an error before it still gets its status; a
    later one is sent as an event.
    """

    media_type = "text/event-stream"

    def __init__(self, produce: Callable[[SendEvent], Awaitable[None]]) -> None:
        super().__init__()
        self._produce = produce
        self._has_begun = False
        self._turn = trio.Lock()  # several choices send, and nothing may overtake the beginning

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when_gone, receive, nursery.cancel_scope)
            await self._answer(send)
            nursery.cancel_scope.cancel()

    async def _answer(self, send: Send) -> None:
        async def send_event(value: Any) -> None:
            data = value.encode() if isinstance(value, str) else _encoder.encode(value)
            async with at_once(self._turn):
                await self._begin(send)
                await send(_body(b"data: " + data + b"\n\n", more=True))

        try:
            await self._produce(send_event)
            await self._begin(send)
        except (ShardmeshError, ExceptionGroup) as error:
            known = known_error(error)
            if known is None:
                raise
            if not self._has_begun:
                await _send_error(send, known)
                return
            await send_event(body_of(known))
        await send(_body(b"", more=False))

    async def _begin(self, send: Send) -> None:
        if not self._has_begun:
            self._has_begun = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-store"),
                (b"x-accel-buffering", b"no"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})


@asynccontextmanager
async def at_once(lock: trio.Lock) -> AsyncIterator[None]:
    """Holds a lock; if nobody else does, without waiting for the next turn of the loop."""
    try:
        lock.acquire_nowait()
    except trio.WouldBlock:
        await lock.acquire()
    try:
        yield
    finally:
        lock.release()


async def _send_error(send: Send, error: ShardmeshError) -> None:
    headers = {"content-type": "application/json", **headers_of(error)}
    await send(
        {
            "type": "http.response.start",
            "status": status_of(error),
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
        }
    )
    await send(_body(_encoder.encode(body_of(error)), more=False))


def _body(data: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def while_wanted(request: Request, work: Callable[[], Awaitable[Result]]) -> Result | None:
    """What `work` gives; it is cancelled, and None given, when the client goes away.

    Raises what `work` raises.
    """
    results: list[Result] = []
    with ungrouped():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when_gone, request.receive, nursery.cancel_scope)
            results.append(await work())
            nursery.cancel_scope.cancel()
    return results[0] if results else None


async def _cancel_when_gone(receive: Receive, scope: trio.CancelScope) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            scope.cancel()
            return
