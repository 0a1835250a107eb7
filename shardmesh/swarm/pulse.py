"""Whether the other side of a connection still speaks.

Whatever comes is a sign of life.  Where nothing comes, one frame of Yamux asks for one: 12 bytes
there and 12 back.  The ping of libp2p takes a stream: some twenty frames and, on both sides, a
hundred and fifty steps of the loop, most of what a node that waits had to do.
"""

from __future__ import annotations

import logging
import struct

import trio
from libp2p.stream_muxer.yamux.yamux import FLAG_SYN, TYPE_PING, YAMUX_HEADER_FORMAT, Yamux

from shardmesh.wire.limits import PING_TIMEOUT_S

_log = logging.getLogger(__name__)

_NUMBER = 0  # of a ping, and of its answer; which one is answered does not matter


class Pulse:
    """The signs of life of one connection."""

    def __init__(self, yamux: Yamux) -> None:
        self.heard_s = trio.current_time()
        """When something came last."""
        self._yamux = yamux
        read = yamux.secured_conn.read

        async def read_and_note(n: int | None = None) -> bytes:
            data = await read(n)
            self.heard_s = trio.current_time()
            return data

        yamux.secured_conn.read = read_and_note  # type: ignore[method-assign]

    async def ask(self) -> None:
        """Asks for a sign of life; whether one comes, `heard_s` tells."""
        # The library measures round trips in the same way, and takes the answer for its own.
        self._yamux._ping_sent_time = trio.current_time()
        ping = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_PING, FLAG_SYN, 0, _NUMBER)
        try:
            with trio.move_on_after(PING_TIMEOUT_S):
                await self._yamux._write_frame(ping)
        except Exception as error:  # noqa: BLE001 - the connection broke, which its reader tells
            _log.debug("a ping could not be sent: %s", error)
