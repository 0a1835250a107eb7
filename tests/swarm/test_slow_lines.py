"""What is long takes its time on a slow line; who does not read at all is given up."""

from __future__ import annotations

from typing import cast

import pytest
import trio
import trio.testing
from libp2p.abc import INetStream
from support.far_end import new_keys

from shardmesh.errors import UnreachableError
from shardmesh.links.outbox import Outbox
from shardmesh.swarm.streams import Libp2pStream, send_message
from shardmesh.wire.limits import MIB, WRITE_BYTES_PER_S_MIN, WRITE_TIMEOUT_S
from shardmesh.wire.sealing import Sealer


class SlowLine(trio.abc.SendStream):
    """Takes so many bytes a second; as a stream of libp2p and as one of trio."""

    def __init__(self, bytes_per_s: float) -> None:
        self.n_sent = 0
        self._bytes_per_s = bytes_per_s

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.sleep(len(data) / self._bytes_per_s)
        self.n_sent += len(data)

    write = send_all

    async def read(self, n: int | None = None) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(("n_times", "arrives"), [(1.01, True), (0.5, False)])
async def test_a_long_message(
    autojump_clock: trio.testing.MockClock, n_times: float, arrives: bool
) -> None:
    """A tokenizer of some MB, over the line of a home."""
    line = SlowLine(n_times * WRITE_BYTES_PER_S_MIN)
    async with trio.open_nursery() as nursery:
        stream = Libp2pStream(cast(INetStream, line), nursery)
        if arrives:
            await send_message(stream, bytes(8 * MIB))
            assert line.n_sent == 8 * MIB + 4
        else:
            with pytest.raises(UnreachableError):
                await send_message(stream, bytes(8 * MIB))
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("n_times", "arrives"), [(1.01, True), (0.5, False)])
async def test_a_long_record(
    autojump_clock: trio.testing.MockClock, n_times: float, arrives: bool
) -> None:
    """Hidden states of a long piece of a wide model."""
    line = SlowLine(n_times * WRITE_BYTES_PER_S_MIN)
    stream = cast(trio.abc.Stream, line)
    outbox = Outbox(stream, Sealer(new_keys().dialer_to_acceptor), "far")
    outbox.put(bytes(8 * MIB))
    with trio.move_on_after(8 * MIB / WRITE_BYTES_PER_S_MIN + 2 * WRITE_TIMEOUT_S):
        if arrives:
            await outbox.write_forever()
        else:
            with pytest.raises(trio.TooSlowError):
                await outbox.write_forever()
    assert (line.n_sent > 8 * MIB) is arrives
