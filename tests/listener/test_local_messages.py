"""The channel between the two processes of a listener."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from support.accepting import new_grants

from shardmesh.errors import UnreachableError
from shardmesh.listener.local_messages import (
    AskMetrics,
    Grant,
    LinkState,
    LocalChannel,
    Metrics,
    NeedLink,
    Ready,
    Stop,
)


async def channel_pair() -> tuple[LocalChannel, LocalChannel, trio.abc.Stream]:
    one, other = trio.testing.memory_stream_pair()
    return LocalChannel(one, one), LocalChannel(other, other), other


async def test_local_messages_go_round() -> None:
    grant, _ = new_grants()
    near, far, raw = await channel_pair()
    link = LinkState(peer_id="p", kind="stream", round_trip_us=1)
    messages = [
        AskMetrics(number=1),
        Metrics(number=1, n_sessions=0, memory_bytes=5, counters={"n": 1}, links=(link,)),
        NeedLink(number=2, peer_id="p", addresses=("a",)),
        Ready(data_port=1, architecture="llama", n_ctx=1, n_parallel=1, fingerprint="f"),
        Stop(),
    ]
    for message in messages:
        await near.send(message)  # type: ignore[arg-type]
    assert [await far.receive() for _ in messages] == messages
    assert Grant.of(grant).link_grant() == grant
    await raw.aclose()
    with pytest.raises(UnreachableError) as caught:
        await near.send(AskMetrics(number=1))
    assert caught.value.code == "PROCESS_GONE"
    assert await near.receive() is None


async def test_a_reader_that_hangs_does_not_hold_up_the_end(
    autojump_clock: trio.testing.MockClock,
) -> None:
    one, _ = trio.testing.lockstep_stream_pair()
    channel = LocalChannel(one, one)
    with trio.move_on_after(0):
        with pytest.raises(UnreachableError) as caught:
            await channel.send(AskMetrics(number=1))
        assert caught.value.code == "PROCESS_GONE"
    assert trio.current_time() < 100
    with pytest.raises(UnreachableError):
        await channel.send(AskMetrics(number=2))
