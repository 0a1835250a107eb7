"""The data port among strangers: slow ones, mad ones, and members that send what no link may."""

from __future__ import annotations

import contextlib
import statistics
import struct
import time
from collections.abc import Callable

import pytest
import trio
import trio.testing
from support.accepting import WORD, accepting, hears_word, new_grants
from support.far_end import FarEnd, Recorder, new_keys
from support.hostile import (
    memory_growth_below,
    n_open_files,
    nonsense,
    seconds_until_closed,
    slow_connections,
    throw_away,
)

from shardmesh.errors import ShardmeshError, TheirError
from shardmesh.links.dial import dial
from shardmesh.links.link import Link
from shardmesh.wire.framing import LENGTH
from shardmesh.wire.limits import (
    FRAME_BODY_BYTES_MAX,
    FRAME_HEADER_BYTES_MAX,
    HANDSHAKE_TIMEOUT_S,
    MIB,
    NESTING_MAX,
)

N_SLOW = 500
N_MALFORMED = 1000
HONEST_TARGET_S = 0.5
HONEST_LIMIT_S = 5.0  # no more than this on a machine with other things to do
N_HONEST = 40
GROWTH_BYTES_MAX = 10 * MIB


@pytest.mark.slow
async def test_five_hundred_slow_connections_are_closed_and_honest_ones_get_through() -> None:
    far_user = Recorder()
    n_files = n_open_files()
    async with accepting(far_user) as (acceptor, endpoints):
        slow = await slow_connections(endpoints[0].port, N_SLOW, b"\0\1\2")
        took_s: list[float] = []
        closed_s: list[float] = []

        async def be_slow(stream: trio.SocketStream) -> None:
            closed_s.append(await seconds_until_closed(stream))

        async with trio.open_nursery() as nursery:
            for stream in slow:
                nursery.start_soon(be_slow, stream)
            for _ in range(N_HONEST):
                grant, expected = new_grants(endpoints)
                acceptor.expect(expected)
                begun_s = time.perf_counter()
                link = await dial(grant, Recorder())
                took_s.append(time.perf_counter() - begun_s)
                async with trio.open_nursery() as running:
                    running.start_soon(link.run)
                    link.close()
    print(f"honest p99 {1e3 * max(took_s):.0f} ms, slow ones closed in {max(closed_s):.2f} s")
    assert statistics.median(took_s) < HONEST_TARGET_S
    assert max(took_s) < HONEST_LIMIT_S
    assert len(closed_s) == N_SLOW
    assert max(closed_s) < HANDSHAKE_TIMEOUT_S + 2
    assert n_open_files() <= n_files


async def test_a_thousand_connections_of_nonsense_leave_nothing_behind() -> None:
    far_user = Recorder()
    async with accepting(far_user) as (acceptor, endpoints):
        port = endpoints[0].port
        await throw_away(port, b"warm")
        with memory_growth_below(GROWTH_BYTES_MAX):
            for data in nonsense(7, N_MALFORMED):
                await throw_away(port, data)
        grant, expected = new_grants(endpoints)
        acceptor.expect(expected)
        await hears_word(await dial(grant, Recorder()), far_user)


def _frame(header: bytes, body: bytes = b"") -> bytes:
    return LENGTH.pack(len(header)) + header + body


MALFORMED: dict[str, Callable[[FarEnd], bytes]] = {
    "4 GiB claimed": lambda far: LENGTH.pack(2**32 - 1) + bytes(100),
    "one past the longest record": lambda far: LENGTH.pack(
        4 + FRAME_HEADER_BYTES_MAX + FRAME_BODY_BYTES_MAX + 16 + 1
    ),
    "not sealed": lambda far: LENGTH.pack(64) + bytes(64),
    "shorter than its seal": lambda far: LENGTH.pack(3) + b"abc",
    "empty": lambda far: LENGTH.pack(0),
    "no header length": lambda far: far.sealed_raw(b"\0\0"),
    "a header longer than its frame": lambda far: far.sealed_raw(struct.pack(">I", 2**32 - 1)),
    "a header one past its limit": lambda far: far.sealed_raw(
        _frame(bytes(FRAME_HEADER_BYTES_MAX + 1))
    ),
    "no CBOR": lambda far: far.sealed_raw(_frame(b"\xff\xff")),
    "100,000 deep": lambda far: far.sealed_raw(_frame(b"\x81" * 100_000 + b"\x00")),
    "one too deep": lambda far: far.sealed_raw(_frame(b"\x81" * NESTING_MAX + b"\x80")),
    "an array of 2^64 items": lambda far: far.sealed_raw(_frame(b"\x9b" + b"\xff" * 8)),
    "a text of 4 GiB": lambda far: far.sealed_raw(_frame(b"\x7a\xff\xff\xff\xff" + b"a" * 9)),
    "an endless array": lambda far: far.sealed_raw(_frame(b"\x9f" + b"\x00" * 9)),
    "a tag": lambda far: far.sealed_raw(_frame(b"\xd8\x23\x64(a+)")),
    "NaN": lambda far: far.sealed_raw(_frame(b"\xa1\x61x\xf9\x7e\x00")),
    "a key twice": lambda far: far.sealed_raw(_frame(b"\xa2\x61x\x00\x61x\x00")),
    "an unknown type": lambda far: far.sealed_raw(_frame(b"\xa1\x64type\x63nix")),
    "a body where none belongs": lambda far: far.sealed(WORD, b"abc"),
}


async def _end_of(data: Callable[[FarEnd], bytes]) -> ShardmeshError:
    """Why a link of a member ends that sends these bytes."""
    keys, user = new_keys(), Recorder()
    near, far_stream = trio.testing.memory_stream_pair()
    link = Link(near, keys, is_dialer=True, peer_id="far", user=user)
    far = FarEnd(far_stream, keys)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(far.greet)
        await link.greet()
        nursery.start_soon(link.run)
        with contextlib.suppress(trio.BrokenResourceError):  # it may end before it had all
            await far.stream.send_all(data(far))
        error = await user.end()
        nursery.cancel_scope.cancel()
    assert user.messages == []
    return error


@pytest.mark.parametrize("kind", MALFORMED)
async def test_what_no_link_may_carry_ends_it(kind: str) -> None:
    assert isinstance(await _end_of(MALFORMED[kind]), TheirError)


async def test_a_thousand_malformed_frames_take_no_memory() -> None:
    kinds = list(MALFORMED.values())
    for kind in kinds:
        await _end_of(kind)
    with memory_growth_below(GROWTH_BYTES_MAX):
        for number in range(N_MALFORMED):
            assert isinstance(await _end_of(kinds[number % len(kinds)]), TheirError)
