"""The way out of a link: straight into the socket while it takes data, else through a queue.

The thread that has computed a result also seals it and hands it to the kernel.  Waking the trio
thread for that, and a writer task in it, took longer than all the rest of sending: 0.3 to 0.5 ms a
hop on two busy cores.
"""

from __future__ import annotations

import os
import threading
from collections import deque

import trio

from shardmesh.errors import BusyError, UnreachableError
from shardmesh.wire.framing import LENGTH
from shardmesh.wire.limits import (
    LINK_QUEUE_BYTES_MAX,
    LINK_QUEUE_FRAMES_MAX,
)
from shardmesh.wire.patience import write_timeout_s
from shardmesh.wire.sealing import Sealer


class Outbox:
    """Seals frames in the order of `put` and writes them in that order.

    `put` may be called from any thread, everything else from the trio thread only.
    """

    def __init__(self, stream: trio.abc.Stream, sealer: Sealer, peer_id: str) -> None:
        self._stream = stream
        self._sealer = sealer
        self._peer_id = peer_id
        self._lock = threading.Lock()
        self._trio_token = trio.lowlevel.current_trio_token()
        self._trio_thread = threading.get_ident()
        self._records: deque[bytes] = deque()
        self.n_put = 0
        """Frames that were accepted so far."""
        self._n_bytes = 0  # in the queue and in the writer's hands
        self._held: list[bytes] | None = None  # between `hold` and `release`
        self._is_closed = False
        self._filled = trio.Event()
        self._flushed = trio.lowlevel.ParkingLot()
        # A descriptor may be used by another connection once it is closed: only under the lock.
        self._descriptor = (
            stream.socket.fileno()
            if isinstance(stream, trio.SocketStream) and os.name == "posix"
            else None
        )

    def put(self, frame: bytes) -> None:
        """Sends a frame, at once if nothing waits before it.

        Raises BusyError (the moment's) when too much waits and UnreachableError when the link has
        ended; the frame is not sent then.
        """
        with self._lock:
            if self._is_closed:
                raise UnreachableError(f"the link to {self._peer_id} is closed", code="LINK_LOST")
            n_bytes, n_frames = self._n_bytes + len(frame), len(self._records)
            if self._held:
                n_bytes += sum(map(len, self._held))
                n_frames += len(self._held)
            if n_bytes > LINK_QUEUE_BYTES_MAX or n_frames >= LINK_QUEUE_FRAMES_MAX:
                raise BusyError(f"{self._peer_id} does not read fast enough", code="LINK_FULL")
            record = self._seal(frame)
            self.n_put += 1
            if self._held is not None and self._n_bytes == 0:
                self._held.append(record)
                return
            is_waiting = self._write_or_queue(record)
        if is_waiting:
            self._wake_writer()

    def hold(self) -> None:
        """Keeps what is put from now on, until `release` writes all of it at once.

        The other side then has it at once, too, and wakes up once for all.  From the one thread
        that computes; not for longer than that takes to put some frames.
        """
        with self._lock:
            self._held = []

    def release(self) -> None:
        """Writes what was held."""
        with self._lock:
            held, self._held = self._held or (), None
            is_waiting = bool(held) and not self._is_closed
            if is_waiting:
                is_waiting = self._write_or_queue(b"".join(held))
        if is_waiting:
            self._wake_writer()

    def _write_or_queue(self, record: bytes) -> bool:
        """With the lock held; whether something is left for the writer."""
        if self._n_bytes == 0:
            record = record[self._write_now(record) :]
            if not record:
                return False
        self._records.append(record)
        self._n_bytes += len(record)
        return True

    async def write_first(self, frame: bytes) -> None:
        """Sends the very first frame of a link and waits until the kernel has it."""
        with self._lock:
            record = self._seal(frame)
        await self._stream.send_all(record)

    async def write_forever(self) -> None:
        """Writes what `put` could not; raises trio.BrokenResourceError or trio.TooSlowError."""
        while True:
            await self._filled.wait()
            self._filled = trio.Event()
            while (record := self._next()) is not None:
                with trio.fail_after(write_timeout_s(len(record))):
                    await self._stream.send_all(record)
                with self._lock:
                    self._n_bytes -= len(record)
            self._flushed.unpark_all()

    async def flush(self) -> None:
        """Waits until all that was put is with the network, or the link has ended."""
        if self._n_bytes and not self._is_closed:
            await self._flushed.park()

    def close(self) -> None:
        """Refuses everything from now on; to be called before the stream is closed."""
        with self._lock:
            self._is_closed = True
            self._records.clear()
        self._flushed.unpark_all()

    def _seal(self, frame: bytes) -> bytes:
        sealed = self._sealer.seal(frame)
        return b"".join((LENGTH.pack(len(sealed)), sealed))

    def _write_now(self, record: bytes) -> int:
        """Bytes that the kernel took without waiting."""
        if self._descriptor is None:
            return 0
        try:
            return os.write(self._descriptor, record)
        except OSError:
            return 0  # it is full: the writer task waits; or has ended, which that one reports

    def _next(self) -> bytes | None:
        with self._lock:
            return self._records.popleft() if self._records else None

    def _wake_writer(self) -> None:
        if threading.get_ident() == self._trio_thread:
            self._filled.set()
        else:
            try:
                self._trio_token.run_sync_soon(lambda: self._filled.set())
            except trio.RunFinishedError:
                return  # the process ends; so does the link
