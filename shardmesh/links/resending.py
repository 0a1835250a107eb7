"""How soon the system sends again what was lost on a connection that carries little."""

from __future__ import annotations

import contextlib
import socket
import sys

import trio

TCP_THIN_LINEAR_TIMEOUTS = 16
"""Of linux/tcp.h; Python has no name for it."""


def resend_steadily(stream: trio.abc.Stream) -> None:
    """Has lost packets sent again after pauses of one length, where the system can do so.

    Else each pause is twice as long as the one before, and all that follows waits: over 100 ms a
    packet that is lost three times comes 2.1 s late, and with this 0.9 s.  Linux does so only while
    fewer than four packets are under way, which is what a link with heartbeats has, and not with
    BBR as its congestion control.
    """
    if sys.platform == "linux" and isinstance(stream, trio.SocketStream):
        with contextlib.suppress(OSError):  # another kind of socket, or an older system
            stream.setsockopt(socket.IPPROTO_TCP, TCP_THIN_LINEAR_TIMEOUTS, 1)
