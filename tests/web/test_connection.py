"""A connection waits for the loop's next turn only where somebody has to be waited for."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from shardmesh.web.connection import IdleWatch, write_at_once
from shardmesh.web.server import bind_sockets, serve_app
from shardmesh.web.sse import at_once

BODY = b"x" * 500
LARGE = b"y" * 5_000_000
TURNS_MAX = 4  # to read, to start the application, and two to spare


@asynccontextmanager
async def stream_pair() -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    ours, theirs = (
        trio.SocketStream(trio.socket.from_stdlib_socket(each)) for each in socket.socketpair()
    )
    async with ours, theirs:
        yield ours, theirs


async def test_what_the_system_takes_is_written_without_waiting() -> None:
    async with stream_pair() as (ours, theirs):
        with trio.testing.assert_no_checkpoints():
            n_taken = write_at_once(ours, BODY)
        assert n_taken == len(BODY)
        assert await theirs.receive_some() == BODY
        with trio.testing.assert_no_checkpoints():
            assert 0 < write_at_once(ours, LARGE) < len(LARGE)
            assert write_at_once(ours, LARGE) < len(LARGE)


async def test_who_is_gone_is_noticed() -> None:
    async with stream_pair() as (ours, theirs):
        await theirs.aclose()
        with pytest.raises(trio.BrokenResourceError):
            write_at_once(ours, BODY)
        await ours.aclose()
        with pytest.raises(trio.ClosedResourceError):
            write_at_once(ours, BODY)


async def test_a_free_lock_is_had_without_waiting() -> None:
    lock = trio.Lock()
    with trio.testing.assert_no_checkpoints():
        async with at_once(lock):
            assert lock.locked()
    async with trio.open_nursery() as nursery:
        async with at_once(lock):
            nursery.start_soon(_take, lock)
            await trio.testing.wait_all_tasks_blocked()
    assert not lock.locked()


async def _take(lock: trio.Lock) -> None:
    async with at_once(lock):
        await trio.lowlevel.checkpoint()


async def _app(scope: Any, receive: Any, send: Any) -> None:
    body = LARGE if scope["path"] == "/large" else BODY
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def served(app: Any = _app) -> AsyncIterator[trio.SocketStream]:
    (bound,) = bind_sockets("127.0.0.1", [0])
    port = bound.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_app, app, [bound])
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            yield stream
        nursery.cancel_scope.cancel()


async def _answer(stream: trio.SocketStream, path: str, n_body: int) -> bytes:
    await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
    data = b""
    with trio.fail_after(20):
        while len(data.partition(b"\r\n\r\n")[2]) < n_body:
            data += await stream.receive_some()
    return data.partition(b"\r\n\r\n")[2]


async def test_few_turns_of_the_loop_for_an_answer() -> None:
    """Each of them lasts some milliseconds while many answers are streamed."""
    async with served() as stream:
        for _ in range(3):
            assert await _answer(stream, "/", len(BODY)) == BODY
        turns = _Turns()
        trio.lowlevel.add_instrument(turns)
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        turns.begin()
        await stream.receive_some()
        trio.lowlevel.remove_instrument(turns)
        assert turns.n_begun <= TURNS_MAX


class _Turns(trio.abc.Instrument):
    def __init__(self) -> None:
        self.n_begun = 0

    def begin(self) -> None:
        self.n_begun = 0

    def before_io_wait(self, timeout: float) -> None:
        self.n_begun += 1


async def test_a_large_answer_comes_whole() -> None:
    async with served() as stream:
        assert await _answer(stream, "/large", len(LARGE)) == LARGE
        assert await _answer(stream, "/", len(BODY)) == BODY


async def test_an_idle_connection_is_ended_and_a_used_one_not(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ended: list[float] = []

    async def note() -> None:
        ended.append(trio.current_time())

    class Tasks:
        def spawn(self, function: Any, *args: Any) -> None:
            nursery.start_soon(function, *args)

    async with trio.open_nursery() as nursery:
        watch = IdleWatch(5.0)
        await watch.restart(Tasks(), note)  # type: ignore[arg-type]
        await trio.sleep(4)
        await watch.stop()
        await trio.sleep(100)
        assert ended == []
        await watch.restart(Tasks(), note)  # type: ignore[arg-type]
    assert ended == [109.0]
    async with trio.open_nursery() as nursery:
        watch = IdleWatch(5.0)
        await watch.restart(Tasks(), note)  # type: ignore[arg-type]
        await trio.lowlevel.checkpoint()
        watch.end()
    assert ended == [109.0]


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(
            b"GET / HTTP/1.1\r\nHost: here\r\nConnection: Upgrade, HTTP2-Settings\r\n"
            b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
            id="asked to upgrade",
        ),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="assumed"),
    ],
)
async def test_nobody_is_answered_in_http_2(asked: bytes) -> None:
    """There, a client that does not read could have any number of answers kept for it."""
    async with served() as stream:
        await stream.send_all(asked)
        with trio.fail_after(20):
            assert (await stream.receive_some()).startswith((b"HTTP/1.1 200", b"HTTP/1.1 400"))


async def test_who_goes_away_is_noticed_even_with_more_requests_under_way() -> None:
    """What was sent ahead of an answer does not hide that nobody waits for it."""
    asked, gone = trio.Event(), trio.Event()

    async def answer_nobody(scope: Any, receive: Any, send: Any) -> None:
        asked.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    async with served(answer_nobody) as stream:
        with trio.fail_after(20):
            await stream.send_all(2 * b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            await asked.wait()
            await trio.testing.wait_all_tasks_blocked()
            await stream.aclose()
            await gone.wait()


async def test_requests_sent_at_once_are_answered_one_after_the_other() -> None:
    async with served() as stream:
        with trio.fail_after(20):
            await stream.send_all(50 * b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            data = b""
            while data.count(BODY) < 50:
                data += await stream.receive_some()
