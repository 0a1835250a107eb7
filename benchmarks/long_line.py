"""Hops that take longer: a process that carries what goes to the data ports, each byte later.

It neither reorders nor limits anything, and needs no rights, as `tc netem` would.  Each listener
announces a loopback address of its own first, where this process listens in its place; links are
dialed there.  (On Linux all of 127.0.0.0/8 is there; elsewhere the addresses must be added.)  The
delay can be changed while links are up, so that both sides of a comparison are
the same mesh.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from benchmarks.child import Child, open_child

CLOSED_PORT: Final = 9
"""In the announced address, where libp2p finds nobody and goes on to the next one at once."""

CHUNK_BYTES: Final = 64 * 1024
HEARTBEATS_S: Final = 3.0
"""Until all that links remember of their round trips is of the new delay."""


def listen_options(shard_id: int, data_port: int) -> tuple[str, ...]:
    """The flags with which a listener is reached through the line."""
    announced = f"/ip4/{_host(shard_id)}/tcp/{CLOSED_PORT}"
    return ("--announce-addr", announced, "--data-port", str(data_port))


class LongLine:
    """The running line; made by `open_line`."""

    def __init__(self, child: Child) -> None:
        self._child = child

    async def delay(self, delay_s: float) -> None:
        """From now on each hop takes so much longer, one way; waits until the links know."""
        await self._child.ask({"delay_s": delay_s})
        await trio.sleep(HEARTBEATS_S)


@asynccontextmanager
async def open_line(data_ports: Sequence[int]) -> AsyncIterator[LongLine]:
    """The line to the listeners with these data ports, without a delay so far."""
    async with open_child(__name__, *map(str, data_ports)) as child:
        await child.ask({"delay_s": 0.0})
        yield LongLine(child)


def _host(shard_id: int) -> str:
    return f"127.0.1.{shard_id + 1}"


class _Carrier:
    """The child's side."""

    def __init__(self) -> None:
        self._delay_s = 0.0

    async def run(self, data_ports: Sequence[int]) -> None:
        async with trio.open_nursery() as nursery:
            for shard_id, port in enumerate(data_ports):
                listeners = await trio.open_tcp_listeners(port, host=_host(shard_id))
                for listener in listeners:
                    nursery.start_soon(self._serve, listener, port)
            await self._obey()
            nursery.cancel_scope.cancel()

    async def _obey(self) -> None:
        """Does what the lines of standard input say until that ends."""
        rest = b""
        async for data in trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._delay_s = json.loads(line)["delay_s"]
                print("{}", flush=True)

    async def _serve(self, listener: trio.SocketListener, port: int) -> None:
        async def carry(near: trio.SocketStream) -> None:
            try:
                far = await trio.open_tcp_stream("127.0.0.1", port)
                async with near, far, trio.open_nursery() as nursery:
                    nursery.start_soon(self._carry, near, far)
                    nursery.start_soon(self._carry, far, near)
            except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # one end was gone, and now the other is

        await trio.serve_listeners(carry, [listener])

    async def _carry(self, source: trio.SocketStream, target: trio.SocketStream) -> None:
        # Not bounded: links have windows of their own, and both ends are ours.
        underway, arriving = trio.open_memory_channel[tuple[float, bytes]](float("inf"))

        async def read() -> None:
            with underway:
                while data := await source.receive_some(CHUNK_BYTES):
                    underway.send_nowait((trio.current_time() + self._delay_s, bytes(data)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            async for due_s, data in arriving:
                await trio.sleep_until(due_s)
                await target.send_all(data)
        await target.aclose()


if __name__ == "__main__":
    trio.run(_Carrier().run, [int(port) for port in sys.argv[1:]])
