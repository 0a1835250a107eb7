"""A connection ends with its client, also when nobody has read all that the client sent."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio

from shardmesh.web import guard, server
from shardmesh.web.guard import Guard, GuardSettings
from shardmesh.web.server import bind_sockets, serve_app
from shardmesh.web.tokens import ApiTokens
from shardmesh.wire.limits import HTTP_BODY_BYTES_MAX

N_CHUNKS = 30
"""More than may wait for an application that does not read."""

TURNS = 100
"""Of the loop: what an application that looks something up needs, and a reader does not."""


async def _looks_up(scope: Any, receive: Any, send: Any) -> None:
    for _ in range(TURNS):
        await trio.lowlevel.checkpoint()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"found"})


@asynccontextmanager
async def served_once() -> AsyncIterator[Any]:
    """Opens connections to a gateway that has room for one."""
    (bound,) = bind_sockets("127.0.0.1", [0])
    app = Guard(_looks_up, GuardSettings(tokens=ApiTokens()), {})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_app, app, [bound])
        yield partial(trio.open_tcp_stream, "127.0.0.1", bound.getsockname()[1])
        nursery.cancel_scope.cancel()


async def _ask(stream: trio.SocketStream, chunks: bytes = b"") -> bytes:
    """The beginning of the answer; empty if there is none."""
    head = b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    try:
        await stream.send_all(head + chunks + b"0\r\n\r\n")
        return (await stream.receive_some()).partition(b"\r\n")[0].strip()
    except trio.BrokenResourceError:
        return b""


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param(b"1\r\nx\r\n" * N_CHUNKS, id="small"),
        pytest.param(
            (b"400\r\n" + bytes(1024) + b"\r\n") * (HTTP_BODY_BYTES_MAX // 1024 + N_CHUNKS),
            id="too large",
        ),
    ],
)
async def test_an_unread_body_holds_no_connection(
    chunks: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HTTP_CONNECTIONS_MAX", 1)
    with trio.fail_after(20):
        async with served_once() as connect:
            async with await connect() as stream:
                await _ask(stream, chunks)
            while True:
                async with await connect() as stream:
                    if await _ask(stream) == b"HTTP/1.1 200":
                        break


async def test_a_body_that_comes_too_slowly_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "HTTP_BODY_TIMEOUT_S", 0.2)
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
    answer = b""
    with trio.fail_after(20):
        async with served_once() as connect, await connect() as stream:
            await stream.send_all(head)
            async for data in stream:  # to its end: what comes late must not be the next request
                answer += data
    first, _, body = answer.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in first.lower()
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "BODY_TOO_SLOW")
