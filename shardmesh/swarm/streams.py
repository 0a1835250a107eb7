"""A stream between two nodes that may be cancelled at any point.

libp2p's own streams share one encrypted connection, and cancelling a read or a write of theirs at
the wrong moment leaves half a frame in it, which ends the connection with all its streams.  So a
reader and a writer task, which live as long as the host, do the touching; the user only waits on
memory channels.
"""

from __future__ import annotations

import logging
import math
import struct
from typing import Final, Protocol, cast

import trio
from libp2p.abc import INetStream
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.network.stream.net_stream import NetStream
from libp2p.stream_muxer.yamux.yamux import YamuxStream

from shardmesh.errors import ProtocolError, UnreachableError
from shardmesh.wire.limits import (
    STREAM_CHUNK_BYTES,
    STREAM_OPEN_TIMEOUT_S,
    STREAM_READ_AHEAD_CHUNKS,
)
from shardmesh.wire.patience import write_timeout_s

_LENGTH: Final = struct.Struct(">I")
_BROKEN: Final = (BaseLibp2pError, OSError, trio.BrokenResourceError, trio.ClosedResourceError)
"""What libp2p raises when a connection goes away under a stream."""

_log = logging.getLogger(__name__)


class ByteStream(Protocol):
    """Bytes to and from another node, in order.  Every method may be cancelled."""

    async def receive_some(self) -> bytes:
        """The next bytes, at most 64 KiB; empty at the end.  UnreachableError if it broke."""
        ...

    async def receive_exactly(self, n_bytes: int) -> bytes:
        """That many bytes; ProtocolError (theirs) if the stream ends before."""
        ...

    async def send_all(self, data: bytes) -> None:
        """Returns when the bytes are handed to the network; UnreachableError if it broke.

        A cancellation leaves the stream usable only for `abort`.
        """
        ...

    async def aclose(self) -> None:
        """Says that nothing more will be sent, and lets go of the stream."""
        ...

    def abort(self) -> None:
        """Resets the stream at once; the other side sees it as broken."""
        ...


class Libp2pStream:
    """A ByteStream on a libp2p stream; made by the host only."""

    def __init__(self, stream: INetStream, nursery: trio.Nursery) -> None:
        self._stream = stream
        self._nursery = nursery
        self._rest = b""
        self._write_lock = trio.Lock()
        self._let_go = False
        self._saw_end = False
        self._ended = trio.Event()  # the reader is done, whether it saw the end or gave up
        self.broken = trio.Event()
        """Set when the other side resets the stream or the connection is gone."""
        chunks_in, self._chunks = trio.open_memory_channel[bytes](STREAM_READ_AHEAD_CHUNKS)
        nursery.start_soon(self._read, chunks_in)

    async def receive_some(self) -> bytes:
        if self._rest:
            data, self._rest = self._rest, b""
            return data
        try:
            return await self._chunks.receive()
        except trio.EndOfChannel:
            if self.broken.is_set():
                raise _gone() from None
            return b""
        except trio.ClosedResourceError:
            raise _gone() from None

    async def receive_exactly(self, n_bytes: int) -> bytes:
        parts: list[bytes] = []
        missing = n_bytes
        while missing:
            data = await self.receive_some()
            if not data:
                raise ProtocolError(f"the stream ended {missing} bytes too early")
            parts.append(data[:missing])
            self._rest = data[missing:]
            missing -= len(parts[-1])
        return b"".join(parts)

    async def send_all(self, data: bytes) -> None:
        done = trio.Event()
        if self._let_go:
            raise _gone()
        self._nursery.start_soon(self._write, bytes(data), done)
        await done.wait()
        if self.broken.is_set():
            raise _gone()

    async def aclose(self) -> None:
        if not self._let_go:
            self._let_go = True
            self._nursery.start_soon(self._finish)
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        if not self._let_go:
            self._let_go = True
            self._nursery.start_soon(self._reset)

    async def _read(self, chunks_in: trio.MemorySendChannel[bytes]) -> None:
        async with chunks_in:
            try:
                while data := await self._stream.read(STREAM_CHUNK_BYTES):
                    await chunks_in.send(data)
            except StreamEOF:
                self._saw_end = True
                if self._was_cut():
                    self.broken.set()
            except trio.BrokenResourceError:
                pass  # nobody reads any more; `_finish` or `_reset` is on its way
            except _BROKEN:
                self._saw_end = True
                self.broken.set()
            finally:
                self._ended.set()

    def _was_cut(self) -> bool:
        """Whether the end was none: Yamux may report a reset or a lost connection as an end."""
        muxed = cast(NetStream, self._stream).muxed_stream
        return self._stream.muxed_conn.is_closed or cast(YamuxStream, muxed).reset_received

    async def _write(self, data: bytes, done: trio.Event) -> None:
        try:
            async with self._write_lock:
                with trio.fail_after(write_timeout_s(len(data))):
                    for start in range(0, len(data), STREAM_CHUNK_BYTES):
                        await self._stream.write(data[start : start + STREAM_CHUNK_BYTES])
        except (*_BROKEN, trio.TooSlowError):
            self.broken.set()
        finally:
            done.set()

    async def _finish(self) -> None:
        """Closes our direction, waits a moment for the other to do the same, else resets."""
        try:
            async with self._write_lock:
                await self._stream.close()
        except _BROKEN:
            self.broken.set()
        self._chunks.close()
        with trio.move_on_after(STREAM_OPEN_TIMEOUT_S):
            await self._ended.wait()
        if not self._saw_end:
            await self._reset()

    async def _reset(self) -> None:
        self.broken.set()
        self._chunks.close()
        try:
            await self._stream.reset()
        except _BROKEN as error:
            _log.debug("a stream could not be reset: %s", error)


def _gone() -> UnreachableError:
    return UnreachableError("the stream to the other node broke", next_step="Try again.")


async def send_message(stream: ByteStream, payload: bytes) -> None:
    """Sends one message: its length as four bytes, big-endian, then itself."""
    await stream.send_all(_LENGTH.pack(len(payload)) + payload)


async def receive_message(
    stream: ByteStream, n_bytes_max: int, *, silence_timeout_s: float = math.inf
) -> bytes:
    """Receives one message; a longer one than allowed is refused before it is read.

    Raises ProtocolError (theirs) for a length beyond `n_bytes_max` or a stream that ends early,
    UnreachableError if the stream broke, or if the beginning or any further STREAM_CHUNK_BYTES
    were not here after `silence_timeout_s`.
    """

    async def receive(n_bytes: int) -> bytes:
        with trio.move_on_after(silence_timeout_s):
            return await stream.receive_exactly(n_bytes)
        raise UnreachableError(f"nothing more came for {silence_timeout_s:g} s")

    (n_bytes,) = _LENGTH.unpack(await receive(_LENGTH.size))
    if n_bytes > n_bytes_max:
        raise ProtocolError(
            f"a message of {n_bytes} bytes; at most {n_bytes_max} are allowed", code="TOO_LARGE"
        )
    starts = range(0, n_bytes, STREAM_CHUNK_BYTES)
    return b"".join([await receive(min(STREAM_CHUNK_BYTES, n_bytes - start)) for start in starts])
