"""What is long takes its time on a slow line; who does not read at all is given up."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing
from libp2p.abc import INetStream
from support.byte_streams import MemoryByteStream, byte_stream_pair
from support.far_end import new_keys
from support.replicas import replica

from shardmesh.coordinator.model_files import ModelFiles
from shardmesh.errors import UnreachableError
from shardmesh.links.outbox import Outbox
from shardmesh.shards.store import ShardStore
from shardmesh.swarm.host import Host
from shardmesh.swarm.streams import Libp2pStream, receive_message, send_message
from shardmesh.wire.codec import encode_cbor
from shardmesh.wire.limits import MIB, WRITE_BYTES_PER_S_MIN, WRITE_TIMEOUT_S
from shardmesh.wire.model_info import ModelInfo
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


class HostOfOneStream(Host):
    """Every stream that it opens is this one."""

    def __init__(self, stream: MemoryByteStream) -> None:
        self._one_stream = stream

    def learn(self, peer_id: str, addresses: object) -> None:
        pass

    async def open_stream(self, *asked: object) -> MemoryByteStream:  # type: ignore[override]
        await trio.lowlevel.checkpoint()
        return self._one_stream


@pytest.mark.parametrize(
    ("n_bytes_given", "is_there"), [(20_000_000, True), (10_000_000, False), (0, False)]
)
async def test_a_tokenizer_comes_as_long_as_more_of_it_comes(
    autojump_clock: trio.testing.MockClock, n_bytes_given: int, is_there: bool, tmp_path: Path
) -> None:
    """20 MB at 100 kB/s; or the line breaks without a word, and another node can be asked."""
    info = ModelInfo(manifest=b"{}", tokenizer=bytes(20_000_000))
    here, there = byte_stream_pair()
    files = ModelFiles(HostOfOneStream(here), ShardStore(tmp_path), tmp_path)

    async def give() -> None:
        await receive_message(there, 1024)
        payload = encode_cbor(info)
        message = (len(payload).to_bytes(4, "big") + payload)[: n_bytes_given * 2]
        for start in range(0, n_bytes_given, 50_000):
            await trio.sleep(0.5)
            end = len(message) if start + 50_000 >= 20_000_000 else start + 50_000
            await there.send_all(message[start:end])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(give)
        if is_there:
            assert await files._ask(replica("far"), "0" * 64) == info
            assert trio.current_time() > 190
        else:
            with pytest.raises(UnreachableError):
                await files._ask(replica("far"), "0" * 64)
            assert trio.current_time() < n_bytes_given / 100_000 + 31


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
