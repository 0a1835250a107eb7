from __future__ import annotations

import json
from typing import Any

import pytest
import trio
import trio.testing

from shardmesh.errors import BusyError
from shardmesh.web import feed as feed_module
from shardmesh.web.event_store import KeptEvent
from shardmesh.web.feed import FEED_INTERVAL_S, MESSAGES_WAITING_MAX, Feed, Subscription


class Source:
    """A document to change."""

    def __init__(self) -> None:
        self.document: dict[str, Any] = {"n": 0}
        self.feed = Feed(lambda: dict(self.document))

    def change(self, **members: object) -> None:
        self.document |= members
        self.feed.touch()


async def told(subscription: Subscription) -> dict[str, Any]:
    with trio.fail_after(60):
        message: dict[str, Any] = json.loads(await subscription.next())
    return message


async def test_a_snapshot_and_then_what_changes(autojump_clock: trio.testing.MockClock) -> None:
    source = Source()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.feed.run)
        with source.feed.subscribe() as news:
            assert await told(news) == {"type": "state", "number": 0, "state": {"n": 0}}
            source.change(n=1, extra="x")
            patch = {"n": 1, "extra": "x"}
            assert await told(news) == {"type": "patch", "number": 1, "patch": patch}
            with source.feed.subscribe() as late:
                first = await told(late)
                assert (first["number"], first["state"]) == (1, {"n": 1, "extra": "x"})
        assert source.feed.n_subscribers == 0
        nursery.cancel_scope.cancel()


async def test_nothing_is_built_while_nobody_looks_on(
    autojump_clock: trio.testing.MockClock,
) -> None:
    n_built = 0

    def document() -> dict[str, Any]:
        nonlocal n_built
        n_built += 1
        return {"n": n_built}

    feed = Feed(document)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed.run)
        with feed.subscribe() as news:
            assert (await told(news))["state"] == {"n": 1}
        for _ in range(20):
            feed.touch()
            await trio.sleep(1)
        assert n_built == 1
        with feed.subscribe() as news:
            assert (await told(news))["state"] == {"n": 2}, "not what was shown long ago"
        nursery.cancel_scope.cancel()


async def test_changes_go_out_together_and_soon(autojump_clock: trio.testing.MockClock) -> None:
    source = Source()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.feed.run)
        with source.feed.subscribe() as news:
            await told(news)
            source.change(n=1)
            await told(news)
            started_s = trio.current_time()
            for n in range(2, 50):
                source.change(n=n)
            assert (await told(news))["patch"] == {"n": 49}
            assert trio.current_time() - started_s <= FEED_INTERVAL_S
        nursery.cancel_scope.cancel()


async def test_who_does_not_read_gets_a_snapshot_when_it_reads_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    source = Source()
    with source.feed.subscribe() as sleeper:
        await told(sleeper)
        for n in range(1, 3 * MESSAGES_WAITING_MAX):
            source.change(n=n)
            source.feed.tell_changes()
        message = await told(sleeper)
        assert (message["type"], message["state"]) == ("state", {"n": n})
        source.change(n=0)
        source.feed.tell_changes()
        assert await told(sleeper) == {
            "type": "patch",
            "number": message["number"] + 1,
            "patch": {"n": 0},
        }


async def test_silence_is_broken_now_and_then(autojump_clock: trio.testing.MockClock) -> None:
    source = Source()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.feed.run)
        with source.feed.subscribe() as news:
            await told(news)
            assert await told(news) == {"type": "tick"}
        nursery.cancel_scope.cancel()


async def test_events_reach_all(autojump_clock: trio.testing.MockClock) -> None:
    source = Source()
    event = KeptEvent(id=7, at_s=1.0, kind="node.left", cause="", data={"peer_id": "a"})
    with source.feed.subscribe() as one, source.feed.subscribe() as other:
        for reader in (one, other):
            await told(reader)
        source.feed.tell_events([event])
        for reader in (one, other):
            assert (await told(reader))["events"][0]["id"] == 7


async def test_subscribers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "SUBSCRIBERS_MAX", 1)
    feed = Source().feed
    with feed.subscribe():
        with pytest.raises(BusyError), feed.subscribe():
            pass
    with feed.subscribe():
        pass
