"""One end of a link against another that is played by hand, on a clock that jumps."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from support.far_end import FarEnd, Recorder, new_keys
from support.link_messages import hidden_batch
from support.mesh import linked_pair

import shardmesh.links.outbox as outbox_module
from shardmesh.errors import BusyError, ProtocolError, UnreachableError
from shardmesh.links.link import Link
from shardmesh.wire.framing import LENGTH
from shardmesh.wire.limits import (
    HANDSHAKE_TIMEOUT_S,
    HEARTBEAT_INTERVAL_S,
    HEARTBEAT_TIMEOUT_S,
    LINK_QUEUE_FRAMES_MAX,
    SILENCE_SUSPECTED_S,
    WRITE_TIMEOUT_S,
)
from shardmesh.wire.messages import (
    CloseSession,
    Hello,
    Message,
    Ping,
    Pong,
    TrimSession,
)

HIDDEN = hidden_batch(n_tokens=2, n_embd=3, sample=False)


def word(number: int) -> Message:
    return TrimSession(session=bytes(16), epoch=0, n_keep=number)


def new_link(stream: trio.abc.Stream, user: Recorder) -> tuple[Link, FarEnd]:
    keys = new_keys()
    link = Link(stream, keys, is_dialer=True, peer_id="far", user=user)
    return link, FarEnd(stream, keys)


@asynccontextmanager
async def greeted(
    user: Recorder, *, lockstep: bool = False, run: bool = True, one_way_s: float = 0.0
) -> AsyncIterator[tuple[Link, FarEnd, trio.Nursery]]:
    """A link to a far end that has greeted and is silent from there on.

    `lockstep` is a network that holds nothing: writing waits for the far end to read.  The
    greeting takes `one_way_s` in each direction.
    """
    pair = trio.testing.lockstep_stream_pair if lockstep else trio.testing.memory_stream_pair
    near, far_stream = pair()
    link, far = new_link(near, user)
    far.stream = far_stream
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as greeting:
            greeting.start_soon(link.greet)
            await trio.sleep(2 * one_way_s)
            greeting.start_soon(far.greet)
        if run:
            nursery.start_soon(link.run)
        yield link, far, nursery
        nursery.cancel_scope.cancel()


async def beat(far: FarEnd) -> None:
    """Pings until the link ends, reads nothing."""
    with contextlib.suppress(trio.BrokenResourceError):
        while True:
            await far.send(Ping(number=1))
            await trio.sleep(1)


def fill(link: Link, body: bytes = b"") -> int:
    """Sends until there is no more room; how many messages found some."""
    for n_sent in range(2 * LINK_QUEUE_FRAMES_MAX):
        try:
            link.send(HIDDEN if body else word(n_sent), body)
        except BusyError as error:
            assert error.code == "LINK_FULL"  # noqa: PT017
            return n_sent
    raise AssertionError("the queue has no bound")


async def ended(stream: trio.abc.Stream) -> None:
    """Returns when the other side has closed the connection."""
    with contextlib.suppress(trio.BrokenResourceError):
        while await stream.receive_some(1000):
            pass


async def test_messages_and_bodies_arrive_in_order_in_both_directions() -> None:
    one, other = Recorder(), Recorder()
    async with trio.open_nursery() as nursery:
        near, far = await linked_pair(nursery, one, other, names=("one", "other"))
        for number in range(50):
            near.send(word(number))
            far.send(word(100 + number))
        near.send(HIDDEN, bytes(range(24)))
        await other.heard(51)
        await one.heard(50)
        near.close()
        await other.end()
    assert other.messages == [*(word(number) for number in range(50)), HIDDEN]
    assert other.bodies[-1] == bytes(range(24))
    assert one.messages == [word(100 + number) for number in range(50)]


async def test_its_user_hears_when_all_that_came_together_was_read() -> None:
    user = Recorder()
    async with greeted(user) as (_, far, _):
        user.read_at.clear()
        records = [far.sealed(each) for each in (word(0), word(1), Pong(number=99))]
        await far.stream.send_all(b"".join(records))
        await user.heard(2)
        await trio.testing.wait_all_tasks_blocked()
        assert user.read_at == [2]
        await far.send(word(2))
        await user.heard(3)
        assert user.read_at[-1] == 3


async def test_silence_closes_the_link(autojump_clock: trio.testing.MockClock) -> None:
    user = Recorder()
    async with greeted(user) as (link, _, _):
        begun_s = trio.current_time()
        assert (await user.end()).code == "LINK_SILENT"
        waited_s = trio.current_time() - begun_s
        assert HEARTBEAT_TIMEOUT_S < waited_s <= HEARTBEAT_TIMEOUT_S + 2 * HEARTBEAT_INTERVAL_S
        assert not link.is_open


async def test_heartbeats_keep_an_idle_link_open(autojump_clock: trio.testing.MockClock) -> None:
    one, other = Recorder(), Recorder()
    async with trio.open_nursery() as nursery:
        near, far = await linked_pair(nursery, one, other, names=("one", "other"))
        await trio.sleep(20 * HEARTBEAT_TIMEOUT_S)
        assert near.is_open
        assert far.is_open
        nursery.cancel_scope.cancel()


async def test_the_round_trip_is_that_of_the_heartbeats(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with greeted(Recorder(), one_way_s=0.1) as (link, far, _):
        assert link.half_round_trip_us == pytest.approx(100_000, abs=10)
        ping = await far.receive()
        assert isinstance(ping, Ping)
        await trio.sleep(0.1)
        await far.send(Pong(number=ping.number + 7))  # to no ping that was sent
        await far.send(Pong(number=ping.number))
        await trio.testing.wait_all_tasks_blocked()
        assert link.half_round_trip_us == pytest.approx(50_000, abs=10)


async def test_the_greeting_tells_the_distance_of_a_link_that_was_dialed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Far away the first heartbeats may be lost and late, and are waited for all the same."""
    user = Recorder()
    async with greeted(user, one_way_s=0.05) as (link, _, _):
        assert link.half_round_trip_us == pytest.approx(50_000, abs=10)
        await trio.sleep(SILENCE_SUSPECTED_S + 2.0)
        assert (link.is_suspected, user.n_suspicions) == (False, 0)
        await trio.sleep(0.3)
        assert (link.is_suspected, user.n_suspicions) == (True, 1)


async def test_a_ping_is_answered_with_its_number() -> None:
    async with greeted(Recorder()) as (_, far, _):
        await far.send(Ping(number=77))
        while (message := await far.receive()) != Pong(number=77):
            assert isinstance(message, Ping)


async def test_a_reader_that_is_gone_closes_the_link(
    autojump_clock: trio.testing.MockClock,
) -> None:
    user = Recorder()
    async with greeted(user, lockstep=True) as (link, far, nursery):
        nursery.start_soon(beat, far)
        begun_s = trio.current_time()
        link.send(word(1))
        assert (await user.end()).code == "LINK_TIMEOUT"
        assert trio.current_time() - begun_s == pytest.approx(WRITE_TIMEOUT_S, abs=1)


async def test_a_full_queue_is_busy_and_what_was_queued_still_goes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    user = Recorder()
    async with greeted(user, lockstep=True) as (link, far, nursery):
        nursery.start_soon(beat, far)
        await trio.testing.wait_all_tasks_blocked()
        n_sent = fill(link)
        assert n_sent >= LINK_QUEUE_FRAMES_MAX - 1
        await trio.sleep(WRITE_TIMEOUT_S / 2)  # heartbeats find no room and do no harm
        assert link.is_open
        found = 0
        while found < n_sent:
            message = await far.receive()
            if isinstance(message, TrimSession):
                assert message == word(found)
                found += 1
        link.send(word(0))


async def test_too_many_bytes_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "LINK_QUEUE_BYTES_MAX", 1000)
    async with greeted(Recorder(), run=False) as (link, _, _):
        assert fill(link, bytes(24)) < 10


async def test_flush_waits_until_all_is_with_the_network(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with greeted(Recorder(), lockstep=True) as (link, far, nursery):
        link.send(word(1))
        with trio.move_on_after(1) as waiting:
            await link.flush()
        assert waiting.cancelled_caught
        done = trio.Event()

        async def flush() -> None:
            await link.flush()
            done.set()

        nursery.start_soon(flush)
        while await far.receive() != word(1):
            pass
        while not done.is_set():
            await far.receive()


async def test_flush_returns_when_the_link_ends() -> None:
    async with greeted(Recorder(), lockstep=True) as (link, _, nursery):
        link.send(word(1))
        nursery.start_soon(link.flush)
        await trio.testing.wait_all_tasks_blocked()
        link.close()
        await link.flush()


@pytest.mark.parametrize("why", [None, ProtocolError("why not", code="WHY")])
async def test_closing_tells_the_user_once_and_ends_the_connection(
    why: ProtocolError | None,
) -> None:
    user = Recorder()
    async with greeted(user) as (link, far, _):
        link.close(why)
        link.close(ProtocolError("later"))
        error = await user.end()
        assert error.code == ("WHY" if why else "LINK_CLOSED")
        with pytest.raises(UnreachableError):
            link.send(word(1))
        await ended(far.stream)


async def test_a_link_closed_before_it_runs_ends_at_once() -> None:
    user = Recorder()
    async with greeted(user, run=False) as (link, _, _):
        link.close()
        await link.run()
        assert (await user.end()).code == "LINK_CLOSED"


async def test_the_far_end_closing_is_a_lost_link() -> None:
    user = Recorder()
    async with greeted(user) as (_, far, _):
        await far.stream.aclose()
        assert (await user.end()).code == "LINK_LOST"


async def test_a_cancellation_closes_the_connection_and_tells_the_user() -> None:
    user = Recorder()
    async with greeted(user, run=False) as (link, far, nursery):
        scope = trio.CancelScope()

        async def run() -> None:
            with scope:
                await link.run()

        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        assert (await user.end()).code == "LINK_CLOSED"
        await ended(far.stream)


async def test_what_the_user_refuses_closes_the_link() -> None:
    user = Recorder()
    user.refuse = ProtocolError("not here", code="NOT_HERE")
    async with greeted(user) as (_, far, _):
        await far.send(CloseSession(session=bytes(16)))
        assert (await user.end()).code == "NOT_HERE"


@pytest.mark.parametrize("kind", ["altered", "replayed", "oversized", "second hello", "no message"])
async def test_broken_records_close_the_link(kind: str) -> None:
    user = Recorder()
    async with greeted(user) as (_, far, _):
        good = far.sealed(word(1))
        data = {
            "altered": good[:-1] + bytes([good[-1] ^ 1]),
            "replayed": good + good,
            "oversized": b"\xff" * 8,
            "second hello": good + far.sealed(Hello(version=1)),
            "no message": LENGTH.pack(0),
        }[kind]
        await far.stream.send_all(data)
        assert isinstance(await user.end(), ProtocolError)
        assert len(user.messages) == (kind in ("replayed", "second hello"))


# -- greeting ----------------------------------------------------------------------------------


async def test_nobody_greets_in_time(autojump_clock: trio.testing.MockClock) -> None:
    near, far_stream = trio.testing.memory_stream_pair()
    link, _ = new_link(near, Recorder())
    begun_s = trio.current_time()
    with pytest.raises(UnreachableError):
        await link.greet()
    assert trio.current_time() - begun_s == pytest.approx(HANDSHAKE_TIMEOUT_S)
    await ended(far_stream)


async def test_the_other_end_leaves_instead_of_greeting() -> None:
    near, far_stream = trio.testing.memory_stream_pair()
    link, _ = new_link(near, Recorder())
    await far_stream.aclose()
    with pytest.raises(UnreachableError):
        await link.greet()


@pytest.mark.parametrize("first", [Hello(version=99), Ping(number=1), None])
async def test_a_wrong_greeting_is_refused(first: Message | None) -> None:
    near, far_stream = trio.testing.memory_stream_pair()
    link, far = new_link(near, Recorder())
    if first is None:  # sealed with other keys
        far = FarEnd(far_stream, new_keys())
        first = Hello(version=1)
    far.stream = far_stream
    await far.send(first)
    with pytest.raises(ProtocolError):
        await link.greet()
    await ended(far_stream)


async def test_a_cancelled_greeting_leaves_no_connection() -> None:
    near, far_stream = trio.testing.memory_stream_pair()
    link, _ = new_link(near, Recorder())
    with trio.move_on_after(0) as scope:
        await link.greet()
    assert scope.cancelled_caught
    await ended(far_stream)
