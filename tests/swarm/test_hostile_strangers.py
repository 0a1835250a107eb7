"""The port of libp2p among strangers: slow ones, mad ones, and many of them."""

from __future__ import annotations

import statistics
import struct
import time

import pytest
import trio
from support.hostile import (
    memory_growth_below,
    n_open_files,
    nonsense,
    port_of,
    seconds_until_closed,
    slow_connections,
    throw_away,
)

from shardmesh.swarm.admission import Admission
from shardmesh.swarm.host import Host, open_host
from shardmesh.swarm.identity import new_identity
from shardmesh.wire.cluster_secret import new_secret
from shardmesh.wire.limits import HANDSHAKE_TIMEOUT_S, MIB

SECRET = new_secret(new_identity().public_key)
N_SLOW = 500
N_MALFORMED = 1000
N_HONEST = 10
HONEST_TARGET_S = 0.5
HONEST_LIMIT_S = 5.0  # no more than this on a machine with other things to do
GROWTH_BYTES_MAX = 10 * MIB

MULTISTREAM = b"\x13/multistream/1.0.0\n"
PRIVATE = b"\x1e/shardmesh/private-noise/1.0\n"
NONSENSE = [
    MULTISTREAM + b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # a line of 2^63 bytes
    MULTISTREAM + b"\x03ls\n" * 100,
    MULTISTREAM + b"\x07/noise\n",
    MULTISTREAM + PRIVATE + b"\xff\xff",  # 64 KiB promised
    MULTISTREAM + PRIVATE + b"\x00\x00",
    MULTISTREAM + PRIVATE + struct.pack(">H", 48) + bytes(48),
    MULTISTREAM + PRIVATE + struct.pack(">H", 65535) + bytes(65535),
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01",
]


def member() -> Admission:
    return Admission(SECRET)


async def connected_in_s(host: Host) -> float:
    """What connecting with the host takes a member that has just come."""
    async with open_host(new_identity(), listen_host="127.0.0.1", admission=member()) as newcomer:
        begun_s = time.perf_counter()
        await newcomer.connect(host.addresses(), 10)
        return time.perf_counter() - begun_s


@pytest.mark.slow
@pytest.mark.parametrize("first_words", [b"", MULTISTREAM + PRIVATE + b"\xff\xff"])
async def test_five_hundred_slow_strangers_are_closed_and_members_get_through(
    first_words: bytes,
) -> None:
    async with open_host(new_identity(), listen_host="127.0.0.1", admission=member()) as host:
        n_files = n_open_files()
        slow = await slow_connections(port_of(host.addresses()[0]), N_SLOW, first_words)
        closed_s: list[float] = []

        async def be_slow(stream: trio.SocketStream) -> None:
            closed_s.append(await seconds_until_closed(stream))

        async with trio.open_nursery() as nursery:
            for stream in slow:
                nursery.start_soon(be_slow, stream)
            took_s = [await connected_in_s(host) for _ in range(N_HONEST)]
        print(f"honest {1e3 * max(took_s):.0f} ms at most, closed in {max(closed_s):.2f} s")
        assert statistics.median(took_s) < HONEST_TARGET_S
        assert max(took_s) < HONEST_LIMIT_S
        assert len(closed_s) == N_SLOW
        assert max(closed_s) < HANDSHAKE_TIMEOUT_S + 2
        assert host.connected() == []
        assert n_open_files() <= n_files + 2


async def test_a_thousand_connections_of_nonsense_leave_nothing_behind() -> None:
    async with open_host(new_identity(), listen_host="127.0.0.1", admission=member()) as host:
        port = port_of(host.addresses()[0])
        await connected_in_s(host)
        for data in NONSENSE:
            await throw_away(port, data)
        with memory_growth_below(GROWTH_BYTES_MAX):
            for number, data in enumerate(nonsense(11, N_MALFORMED)):
                await throw_away(port, NONSENSE[number % len(NONSENSE)] if number % 2 else data)
        assert await connected_in_s(host) < 5
