"""Those who mean harm: connections that say little or nonsense, and what they cost."""

from __future__ import annotations

import gc
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import trio


async def slow_connections(port: int, n: int, first_words: bytes = b"") -> list[trio.SocketStream]:
    """Connections to this machine that say a few bytes and then nothing."""
    streams: list[trio.SocketStream] = []

    async def connect() -> None:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.send_all(first_words)
        streams.append(stream)

    async with trio.open_nursery() as nursery:
        for _ in range(n):
            nursery.start_soon(connect)
    return streams


async def seconds_until_closed(stream: trio.SocketStream) -> float:
    """How long the other side keeps a connection on which nothing more is said; closes it."""
    begun_s = trio.current_time()
    try:
        while await stream.receive_some(4096):
            pass
    except trio.BrokenResourceError:
        pass
    finally:
        await trio.aclose_forcefully(stream)
    return trio.current_time() - begun_s


async def throw_away(port: int, data: bytes) -> None:
    """Connects, says the bytes, and waits until the other side has had enough of it."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    try:
        await stream.send_all(data)
        await stream.send_eof()
        while await stream.receive_some(4096):
            pass
    except (OSError, trio.BrokenResourceError):
        pass
    finally:
        await trio.aclose_forcefully(stream)


def nonsense(seed: int, n: int) -> Iterator[bytes]:
    """Byte strings that no protocol has use for, reproducible."""
    dice = random.Random(seed)
    for _ in range(n):
        yield dice.randbytes(dice.choice((1, 4, 16, 17, 64, 1000)))


@contextmanager
def memory_growth_below(n_bytes_max: int) -> Iterator[None]:
    """Holds this process to a bound of what the block may leave behind."""
    gc.collect()
    before = psutil.Process().memory_info().rss
    yield
    gc.collect()
    grown = psutil.Process().memory_info().rss - before
    assert grown < n_bytes_max, f"{grown / 2**20:.1f} MiB more than before"


def port_of(address: str) -> int:
    """The TCP port in a multiaddress."""
    return int(address.split("/")[4])


def n_open_files() -> int:
    """File descriptors of this process, sockets among them."""
    return psutil.Process().num_fds()


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
