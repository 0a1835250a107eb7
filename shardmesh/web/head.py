"""HEAD for every route that has GET: the same answer without its body (RFC 9110 section 9.3.2)."""

from __future__ import annotations

import trio
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadAsGet:
    """ASGI middleware: routes see a GET, which ends with the head of its answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        with trio.CancelScope() as answering:

            async def send_head(message: Message) -> None:
                if message["type"] == "http.response.start":
                    await send(message)
                    answering.cancel()  # the body may have no end
                await trio.lowlevel.checkpoint()

            await self._app({**scope, "method": "GET"}, receive, send_head)
        if answering.cancel_called:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
