from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from support.announcements import CLUSTER, an_announcement
from support.byte_streams import byte_stream_pair

from shardmesh.errors import ShardmeshError, UnreachableError
from shardmesh.swarm.directory import Directory
from shardmesh.swarm.directory_news import (
    follow_directory,
    news_since,
    serve_directory_news,
    take_in_news,
    tell_news,
)
from shardmesh.swarm.host import open_host
from shardmesh.swarm.identity import Identity, new_identity
from shardmesh.swarm.streams import receive_message
from shardmesh.wire.announcement import DirectoryNews, encode_signed
from shardmesh.wire.codec import decode_cbor
from shardmesh.wire.limits import (
    DIRECTORY_NEWS_HEARTBEAT_S,
    DIRECTORY_NEWS_INTERVAL_S,
    DIRECTORY_NEWS_SILENCE_MAX_S,
    DIRECTORY_RESPONSE_BYTES_MAX,
)

ALICE, BOB = new_identity(), new_identity()
KNOWN = st.dictionaries(st.sampled_from("abcdef"), st.binary(max_size=2), max_size=6)


def sign(identity: Identity, **changes: object) -> bytes:
    return encode_signed(an_announcement(identity, **changes), identity)


@given(KNOWN, KNOWN)
def test_news_make_the_new_state_of_the_old(told: dict[str, bytes], now: dict[str, bytes]) -> None:
    news = news_since(told, now)
    assert set(news.gone) == told.keys() - now.keys()
    changed = {who for who in now if told.get(who) != now[who]}
    assert sorted(news.announcements) == sorted(now[who] for who in changed)


@asynccontextmanager
async def followed(there: Directory, here: Directory, gone: list[str]) -> AsyncIterator[None]:
    """`here` follows `there` over memory."""
    teller, reader = byte_stream_pair()

    def note(peer_ids: Sequence[str]) -> None:
        gone.extend(peer_ids)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell_news, teller, there)
        nursery.start_soon(take_in_news, reader, here, "there", note)
        yield
        nursery.cancel_scope.cancel()


async def test_a_change_is_told_at_once(autojump_clock: trio.testing.MockClock) -> None:
    here, there = Directory(CLUSTER), Directory(CLUSTER)
    there.update(sign(ALICE))
    async with followed(there, here, []):
        await here.wait_changed(0)
        assert trio.current_time() == 0
        for sequence in range(2, 6):
            await trio.sleep(1.0)
            changed_s = trio.current_time()
            there.update(sign(ALICE, sequence=sequence))
            await here.wait_changed()
            assert trio.current_time() == changed_s


async def test_changes_that_follow_each_other_are_told_together(
    autojump_clock: trio.testing.MockClock,
) -> None:
    here, there = Directory(CLUSTER), Directory(CLUSTER)
    there.update(sign(ALICE))
    async with followed(there, here, []):
        await here.wait_changed(0)
        there.update(sign(ALICE, sequence=2))
        there.update(sign(BOB))
        while len(here.all()) < 2:
            await here.wait_changed()
        assert trio.current_time() <= DIRECTORY_NEWS_INTERVAL_S


async def test_who_is_gone_there_is_doubted_here(autojump_clock: trio.testing.MockClock) -> None:
    here, there = Directory(CLUSTER), Directory(CLUSTER)
    here.update(sign(BOB))  # the other side never knew that one
    there.update(sign(ALICE))
    gone: list[str] = []
    async with followed(there, here, gone):
        await here.wait_changed(1)
        assert gone == [BOB.peer_id]
        there.mark_unreachable(ALICE.peer_id)
        await trio.sleep(1)
        assert gone == [BOB.peer_id, ALICE.peer_id]
        assert here.get(ALICE.peer_id), "whether it is gone, this node finds out by itself"


async def test_a_directory_without_changes_shows_that_it_lives(
    autojump_clock: trio.testing.MockClock,
) -> None:
    teller, reader = byte_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell_news, teller, Directory(CLUSTER))
        for _ in range(3):
            data = await receive_message(reader, DIRECTORY_RESPONSE_BYTES_MAX)
            assert decode_cbor(data, DirectoryNews) == DirectoryNews(announcements=(), gone=())
        assert trio.current_time() <= 2 * (DIRECTORY_NEWS_HEARTBEAT_S + DIRECTORY_NEWS_INTERVAL_S)
        nursery.cancel_scope.cancel()


async def test_a_silent_neighbour_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    _silent, reader = byte_stream_pair()
    with pytest.raises(UnreachableError):
        await take_in_news(reader, Directory(CLUSTER), "silent", print)
    assert trio.current_time() == DIRECTORY_NEWS_SILENCE_MAX_S


async def test_news_that_are_too_long_are_not_read() -> None:
    hostile, reader = byte_stream_pair()
    await hostile.send_all((DIRECTORY_RESPONSE_BYTES_MAX + 1).to_bytes(4, "big"))
    with pytest.raises(ShardmeshError) as caught:
        await take_in_news(reader, Directory(CLUSTER), "hostile", print)
    assert caught.value.code == "TOO_LARGE"


async def test_a_reader_that_is_gone_ends_the_telling() -> None:
    teller, reader = byte_stream_pair()
    reader.abort()
    with pytest.raises(UnreachableError):
        await tell_news(teller, Directory(CLUSTER))


async def test_between_two_hosts() -> None:
    here, there = Directory(CLUSTER), Directory(CLUSTER)
    async with (
        open_host(ALICE, listen_host="127.0.0.1") as alice,
        open_host(BOB, listen_host="127.0.0.1") as bob,
    ):
        serve_directory_news(bob, there)
        await alice.connect(bob.addresses(), 5)
        with pytest.raises(ShardmeshError), trio.fail_after(5):
            await follow_directory(alice, Directory("another"), BOB.peer_id, print)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow_directory, alice, here, BOB.peer_id, print)
            for sequence in range(1, 4):
                there.update(sign(BOB, sequence=sequence))
                with trio.fail_after(5):
                    await here.wait_changed(sequence - 1)
            with pytest.raises(ShardmeshError), trio.fail_after(5):
                await follow_directory(alice, here, BOB.peer_id, print)  # once is enough
            nursery.cancel_scope.cancel()
