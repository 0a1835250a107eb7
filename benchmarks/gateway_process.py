"""`shardmesh web` as a process, and just enough HTTP to measure it: no client library's time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from benchmarks.generation import Generation
from shardmesh.errors import OurError

START_TIMEOUT_S: Final = 60.0
ANSWER_TIMEOUT_S: Final = 120.0
END_TIMEOUT_S: Final = 5.0
HEAD_BYTES_MAX: Final = 64 * 1024
_EVENT: Final = b"data: "
_PIECE: Final = b"data: {"


class GatewayProcess:
    """A running gateway; made by `open_gateway_process`."""

    def __init__(self, port: int, pid: int) -> None:
        self.port = port
        self.pid = pid


@asynccontextmanager
async def open_gateway_process(where: Sequence[str]) -> AsyncIterator[GatewayProcess]:
    """A gateway of the mesh that `where` leads to; it has ended when the block is left."""
    options = ("--port", "0", "--ws-port", "0", "--no-prefix-reuse", "--drafts", "off")
    command = [sys.executable, "-m", "shardmesh", "web", *options, *where]
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        if process.stdout is None:
            raise OurError("the gateway has no output")
        port = await _port_in(process.stdout)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_read_on, process.stdout)
            yield GatewayProcess(port, process.pid)
            nursery.cancel_scope.cancel()
    finally:
        process.terminate()
        with trio.CancelScope(shield=True), trio.move_on_after(END_TIMEOUT_S):
            await process.wait()
        if process.returncode is None:
            process.kill()


async def _port_in(log: trio.abc.ReceiveStream) -> int:
    """The port that the gateway names once it serves."""
    text = b""
    with trio.move_on_after(START_TIMEOUT_S):
        async for data in log:
            text = (text + data)[-HEAD_BYTES_MAX:]
            if found := re.search(rb"HTTP on http://[\d.]+:(\d+)/", text):
                return int(found[1])
    raise OurError("the gateway did not start:\n" + text.decode("utf-8", "replace")[-500:])


async def _read_on(log: trio.abc.ReceiveStream) -> None:
    """So that the gateway can write; that it ends is noticed by those who ask it."""
    async for _ in log:
        pass


class Connection:
    """A kept-alive connection to a gateway."""

    def __init__(self, stream: trio.SocketStream, port: int) -> None:
        self._stream = stream
        self._port = port

    async def get(self, path: str) -> float:
        """Seconds until the whole answer is there; raises OurError for a status that is not 200."""
        started_s = time.perf_counter()
        await self._ask(f"GET {path}", b"")
        head, body = await self._head()
        length = re.search(rb"content-length: (\d+)", head.lower())
        while length and len(body) < int(length[1]):
            body += await self._receive()
        return time.perf_counter() - started_s

    async def complete(self, prompt: str, n_tokens: int) -> Generation:
        """A streamed completion; its times are those at which the bytes arrived here."""
        started_s = time.perf_counter()
        await self._ask("POST /v1/completions", _completion_body(prompt, n_tokens))
        _, rest = await self._head()
        pieces_s: list[float] = []
        n_prompt_tokens = 0
        while True:
            now_s = time.perf_counter()
            *lines, rest = rest.split(b"\n")
            for line in lines:
                if line.startswith(_PIECE):
                    event = json.loads(line.removeprefix(_EVENT))
                    if any(choice["finish_reason"] is None for choice in event["choices"]):
                        pieces_s.append(now_s)
                    if usage := event.get("usage"):
                        n_prompt_tokens = usage["prompt_tokens"]
                        _require_equal(usage["completion_tokens"], n_tokens)
            if any(line == b"0\r" for line in lines):  # the last chunk
                break
            rest += await self._receive()
        if not pieces_s:
            raise OurError("the gateway streamed nothing")
        decode_s = pieces_s[-1] - pieces_s[0]
        return Generation(
            n_prompt_tokens=n_prompt_tokens,
            tokens=(),
            first_token_s=pieces_s[0] - started_s,
            text_s=tuple(piece_s - started_s for piece_s in pieces_s),
            total_s=pieces_s[-1] - started_s,
            decode_tokens_per_s=(n_tokens - 1) / decode_s if decode_s > 0 else None,
        )

    async def drain(self, prompt: str, n_tokens: int) -> None:
        """The same answer, not looked at: a client that takes little from who is measured."""
        await self._ask("POST /v1/completions", _completion_body(prompt, n_tokens))
        _, end = await self._head()
        while not end.endswith(b"\r\n0\r\n\r\n"):
            end = (end + await self._receive())[-16:]

    async def _ask(self, what: str, body: bytes) -> None:
        head = f"{what} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        await self._stream.send_all(f"{head}\r\n".encode() + body)

    async def _head(self) -> tuple[bytes, bytes]:
        data = b""
        while b"\r\n\r\n" not in data:
            data += await self._receive()
        head, _, rest = data.partition(b"\r\n\r\n")
        if b" 200" not in head.split(b"\r\n")[0]:
            raise OurError(f"the gateway answered {data[:500]!r}")
        return head, rest

    async def _receive(self) -> bytes:
        with trio.fail_after(ANSWER_TIMEOUT_S):
            data = await self._stream.receive_some()
        if not data:
            raise OurError("the gateway ended a connection")
        return bytes(data)


def _completion_body(prompt: str, n_tokens: int) -> bytes:
    return json.dumps(
        {
            "prompt": prompt,
            "max_tokens": n_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


def _require_equal(n_found: int, n_wanted: int) -> None:
    if n_found != n_wanted:
        raise OurError(f"{n_found} tokens came instead of {n_wanted}")


@asynccontextmanager
async def open_connection(gateway: GatewayProcess) -> AsyncIterator[Connection]:
    """A connection to a gateway on this machine."""
    stream = await trio.open_tcp_stream("127.0.0.1", gateway.port)
    try:
        yield Connection(stream, gateway.port)
    finally:
        await trio.aclose_forcefully(stream)
