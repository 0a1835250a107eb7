"""A pair of `swarm.streams.ByteStream` in memory, for what two nodes say to each other."""

from __future__ import annotations

import trio
import trio.testing

from shardmesh.errors import ProtocolError, UnreachableError

_End = trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]


class MemoryByteStream:
    """One end; `abort` breaks both."""

    def __init__(self, stream: _End) -> None:
        self._stream = stream
        self._rest = b""

    async def receive_some(self) -> bytes:
        if self._rest:
            data, self._rest = self._rest, b""
            return data
        try:
            return bytes(await self._stream.receive_some())
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise UnreachableError("the stream broke") from None

    async def receive_exactly(self, n_bytes: int) -> bytes:
        found = b""
        while len(found) < n_bytes:
            data = await self.receive_some()
            if not data:
                raise ProtocolError("the stream ended too early")
            found += data
        found, self._rest = found[:n_bytes], found[n_bytes:]
        return found

    async def send_all(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise UnreachableError("the stream broke") from None

    async def aclose(self) -> None:
        await self._stream.aclose()

    def abort(self) -> None:
        self._stream.send_stream.close()
        self._stream.receive_stream.close()


def byte_stream_pair() -> tuple[MemoryByteStream, MemoryByteStream]:
    """Two ends of one stream."""
    one, other = trio.testing.memory_stream_pair()
    return MemoryByteStream(one), MemoryByteStream(other)
