"""As much of a WebSocket client as it takes to look on: a handshake, and frames that come."""

from __future__ import annotations

import base64
import json
import secrets
import struct
from typing import Any, Final

import trio

from shardmesh.errors import OurError

FRAME_BYTES_MAX: Final = 16 * 1024 * 1024
TIMEOUT_S: Final = 30.0
_TEXT: Final = 1


class Onlooker:
    """A page that looks on and says nothing; made by `open_onlooker`."""

    def __init__(self, stream: trio.SocketStream, rest: bytes) -> None:
        self._stream = stream
        self._rest = rest

    async def next(self) -> dict[str, Any]:
        """The next message; raises OurError if the socket ends or is silent instead."""
        try:
            with trio.fail_after(TIMEOUT_S):
                while True:
                    kind, payload = await self._frame()
                    if kind == _TEXT:
                        message: dict[str, Any] = json.loads(payload)
                        return message
        except (trio.TooSlowError, trio.BrokenResourceError) as error:
            raise OurError("the gateway says nothing over a WebSocket") from error

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)

    async def _frame(self) -> tuple[int, bytes]:
        first, length = await self._take(2)
        if length == 126:
            (length,) = struct.unpack(">H", await self._take(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", await self._take(8))
        if length > FRAME_BYTES_MAX:
            raise OurError("a frame of the gateway is too long")
        return first & 0x0F, await self._take(length)

    async def _take(self, n_bytes: int) -> bytes:
        while len(self._rest) < n_bytes:
            data = await self._stream.receive_some()
            if not data:
                raise OurError("the gateway ended a WebSocket")
            self._rest += data
        taken, self._rest = self._rest[:n_bytes], self._rest[n_bytes:]
        return taken


async def open_onlooker(port: int, host: str = "127.0.0.1") -> Onlooker:
    """A WebSocket at /ws of a gateway; raises OurError if it is refused."""
    stream = await trio.open_tcp_stream(host, port)
    key = base64.b64encode(secrets.token_bytes(16)).decode()
    lines = [
        "GET /ws HTTP/1.1",
        f"Host: {host}:{port}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Protocol: shardmesh",
    ]
    await stream.send_all("\r\n".join([*lines, "", ""]).encode())
    head = b""
    with trio.move_on_after(TIMEOUT_S):
        while b"\r\n\r\n" not in head:
            data = await stream.receive_some()
            if not data:
                break
            head += data
    head, _, rest = head.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 101"):
        await trio.aclose_forcefully(stream)
        raise OurError(f"the gateway opens no WebSocket: {head[:60]!r}")
    return Onlooker(stream, rest)
