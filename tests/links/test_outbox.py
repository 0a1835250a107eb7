"""The way out of a link over a real socket: one order, from whatever thread and however full."""

from __future__ import annotations

import contextlib
import os
import socket
import threading

import pytest
import trio
from support.far_end import new_keys

import shardmesh.links.outbox as outbox_module
from shardmesh.errors import BusyError, UnreachableError
from shardmesh.links.outbox import Outbox
from shardmesh.wire.framing import RecordReader
from shardmesh.wire.sealing import Opener, Sealer

N_THREADS = 3
N_FRAMES = 40
FRAME_BYTES = 20_000  # all together more than the kernel holds


def socket_streams() -> tuple[trio.SocketStream, trio.SocketStream]:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    return (
        trio.SocketStream(trio.socket.from_stdlib_socket(one)),
        trio.SocketStream(trio.socket.from_stdlib_socket(other)),
    )


async def test_frames_of_several_threads_arrive_whole_and_each_threads_own_in_order() -> None:
    keys = new_keys()
    near, far = socket_streams()
    outbox = Outbox(near, Sealer(keys.dialer_to_acceptor), "far")
    opener = Opener(keys.dialer_to_acceptor)
    found: list[bytes] = []

    def put_all(thread: int) -> None:
        for number in range(N_FRAMES):
            outbox.put(bytes([thread, number]) * (FRAME_BYTES // 2))

    async def read() -> None:
        reader = RecordReader()
        while len(found) < N_THREADS * N_FRAMES:
            found.extend(opener.open(r) for r in reader.feed(await far.receive_some(65536)))

    async with near, far, trio.open_nursery() as nursery:
        nursery.start_soon(outbox.write_forever)
        async with trio.open_nursery() as putting:
            for thread in range(N_THREADS):
                putting.start_soon(trio.to_thread.run_sync, put_all, thread)
        is_flushed = trio.Event()

        async def flush() -> None:
            await outbox.flush()
            is_flushed.set()

        nursery.start_soon(flush)
        await read()
        await is_flushed.wait()
        nursery.cancel_scope.cancel()
    for thread in range(N_THREADS):
        own = [frame[1] for frame in found if frame[0] == thread]
        assert own == list(range(N_FRAMES))
    assert all(frame == frame[:2] * (FRAME_BYTES // 2) for frame in found)


async def test_a_frame_goes_out_at_once_while_the_socket_takes_it() -> None:
    keys = new_keys()
    near, far = socket_streams()
    outbox = Outbox(near, Sealer(keys.dialer_to_acceptor), "far")
    async with near, far:
        thread = threading.Thread(target=outbox.put, args=(b"frame",))
        thread.start()
        thread.join()
        (record,) = RecordReader().feed(await far.receive_some(1000))  # no writer runs
        assert Opener(keys.dialer_to_acceptor).open(record) == b"frame"


async def test_a_closed_outbox_refuses_and_a_full_one_is_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox_module, "LINK_QUEUE_BYTES_MAX", 1_000_000)
    near, far = socket_streams()
    outbox = Outbox(near, Sealer(new_keys().dialer_to_acceptor), "far")
    async with near, far:
        with pytest.raises(BusyError):  # noqa: PT012
            for _ in range(200):
                outbox.put(bytes(100_000))
        outbox.close()
        await outbox.flush()
        with pytest.raises(UnreachableError):
            outbox.put(b"x")


async def test_a_reader_that_is_gone_is_no_error_of_put() -> None:
    near, far = socket_streams()
    outbox = Outbox(near, Sealer(new_keys().dialer_to_acceptor), "far")
    await far.aclose()
    async with near:
        for _ in range(20):
            outbox.put(bytes(100_000))
        with pytest.raises(trio.BrokenResourceError):
            await outbox.write_forever()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system cannot be hurried")
async def test_a_connection_that_the_system_gives_up_is_met_by_the_writer_only() -> None:
    """Whoever sends is not the one to be told that packets found no way for too long."""
    near, far = socket_streams()
    async with near, far:
        near.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1)
        with contextlib.suppress(BlockingIOError):
            while True:  # the far side reads nothing
                os.write(near.socket.fileno(), bytes(65536))
        outbox = Outbox(near, Sealer(new_keys().dialer_to_acceptor), "far")
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(near.socket)  # given up
        outbox.put(b"frame")
        with pytest.raises(trio.BrokenResourceError):
            await outbox.write_forever()


async def test_what_is_held_goes_out_at_once_and_in_order() -> None:
    keys = new_keys()
    near, far = socket_streams()
    outbox = Outbox(near, Sealer(keys.dialer_to_acceptor), "far")
    opener = Opener(keys.dialer_to_acceptor)
    async with near, far:
        outbox.hold()
        for number in range(5):
            outbox.put(bytes([number]))
        with trio.move_on_after(0):  # it is a socket: what was written is there
            await far.receive_some(1000)
            raise AssertionError("something was written")
        outbox.release()
        outbox.put(b"later")  # no writer runs
        records = RecordReader().feed(await far.receive_some(1000))
        assert [opener.open(record) for record in records] == [*map(bytes, zip(range(5))), b"later"]
        outbox.release()  # nothing was held


async def test_what_is_held_waits_its_turn_behind_what_waits_already() -> None:
    keys = new_keys()
    near, far = socket_streams()
    outbox = Outbox(near, Sealer(keys.dialer_to_acceptor), "far")
    opener, reader = Opener(keys.dialer_to_acceptor), RecordReader()
    frames = [bytes([number]) * 1_000_000 for number in range(6)]
    found: list[bytes] = []
    async with near, far, trio.open_nursery() as nursery:
        for frame in frames[:3]:
            outbox.put(frame)
        outbox.hold()
        for frame in frames[3:5]:
            outbox.put(frame)
        outbox.release()
        outbox.hold()
        nursery.start_soon(outbox.write_forever)
        while len(found) < 5:
            found += [opener.open(r) for r in reader.feed(await far.receive_some(65536))]
        outbox.put(frames[5])
        outbox.release()
        while len(found) < 6:
            found += [opener.open(r) for r in reader.feed(await far.receive_some(65536))]
        nursery.cancel_scope.cancel()
    assert found == frames


async def test_what_is_held_counts_as_waiting_and_is_not_written_once_it_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox_module, "LINK_QUEUE_FRAMES_MAX", 3)
    near, far = socket_streams()
    outbox = Outbox(near, Sealer(new_keys().dialer_to_acceptor), "far")
    async with near, far:
        outbox.hold()
        for _ in range(3):
            outbox.put(b"x")
        with pytest.raises(BusyError):
            outbox.put(b"x")
        outbox.close()
        outbox.release()
        await near.aclose()
        assert await far.receive_some(1000) == b""
