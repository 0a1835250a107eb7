"""What a client reads is whole events in whole chunks, however slowly it reads."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import h11
import pytest
import trio
import trio.testing

from shardmesh.errors import UnreachableError, ungrouped
from shardmesh.web.server import bind_sockets, serve_app
from shardmesh.web.sse import EventStream, SendEvent

N_CHOICES = 4
TEXT = "x" * 50_000
N_EVENTS = 40  # of each choice; together more than the system keeps for one connection

Produce = Callable[[SendEvent], Awaitable[None]]


@asynccontextmanager
async def asked(produce: Produce) -> AsyncIterator[trio.SocketStream]:
    """A connection over which the events of `produce` were asked for; the system keeps little."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await EventStream(produce)(scope, receive, send)

    (bound,) = bind_sockets("127.0.0.1", [0])
    ours = trio.socket.socket()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_app, app, [bound])
        await ours.connect(bound.getsockname())
        async with trio.SocketStream(ours) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            yield stream
        nursery.cancel_scope.cancel()


async def events(stream: trio.SocketStream) -> list[Any]:
    """The events of one answer, read to its proper end; any other raises h11's error."""
    reader, body = h11.Connection(h11.CLIENT), bytearray()
    reader.send(h11.Request(method="GET", target="/", headers=[("Host", "here")]))
    reader.send(h11.EndOfMessage())
    while True:
        match reader.next_event():
            case h11.NEED_DATA:
                reader.receive_data(bytes(await stream.receive_some(30_000)))
            case h11.Data(data=data):
                body += data
            case h11.EndOfMessage():
                break
    lines = body.decode().split("\n\n")
    assert lines.pop() == ""
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def test_several_choices_for_a_slow_reader() -> None:
    async def produce(send: SendEvent) -> None:
        async def choice(number: int) -> None:
            for index in range(N_EVENTS):
                await send([number, index, TEXT])

        async with trio.open_nursery() as nursery:
            for number in range(N_CHOICES):
                nursery.start_soon(choice, number)

    with trio.fail_after(30):
        async with asked(produce) as stream:
            await trio.testing.wait_all_tasks_blocked()
            found = await events(stream)
    assert all(text == TEXT for _, _, text in found)
    for number in range(N_CHOICES):
        assert [index for n, index, _ in found if n == number] == list(range(N_EVENTS))


@pytest.mark.parametrize("n_choices", [1, N_CHOICES])
async def test_one_that_fails_while_an_event_is_half_written(n_choices: int) -> None:
    """Others are cancelled then; what a client has half of must still be brought to its end."""

    async def produce(send: SendEvent) -> None:
        async def choice(number: int) -> None:
            while True:
                await send([number, TEXT])

        async def fail() -> None:
            await trio.testing.wait_all_tasks_blocked()
            raise UnreachableError("a stage is gone")

        with ungrouped():
            async with trio.open_nursery() as nursery:
                for number in range(n_choices):
                    nursery.start_soon(choice, number)
                nursery.start_soon(fail)

    with trio.fail_after(30):
        async with asked(produce) as stream:
            await trio.testing.wait_all_tasks_blocked()
            *found, last = await events(stream)
    assert all(text == TEXT for _, text in found)
    assert last["error"]["message"] == "a stage is gone"
