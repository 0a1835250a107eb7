"""What happens in the mesh is on the page within 300 ms, whatever else is going on.

The clock stands still while anything computes, so what is measured are the waits that add up.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec
import pytest
import trio
import trio.testing
from support.announcements import CLUSTER, an_announcement, capabilities
from support.byte_streams import byte_stream_pair

from shardmesh.swarm.directory import Directory
from shardmesh.swarm.directory_news import take_in_news, tell_news
from shardmesh.swarm.host import Host
from shardmesh.swarm.identity import Identity, new_identity
from shardmesh.web.console import Console
from shardmesh.web.event_store import open_event_store
from shardmesh.web.events import EventHub
from shardmesh.web.feed import Subscription
from shardmesh.web.node_reports import (
    ASK_INTERVAL_MOVING_S,
    ASK_INTERVAL_S,
    ASK_INTERVAL_UNSEEN_S,
    NEWS_PAUSE_S,
    NodeReports,
    has_news,
    pause_s,
)
from shardmesh.web.roster import Download, Report
from shardmesh.web.sessions import SessionBoard
from shardmesh.web.watch import MeshWatch
from shardmesh.wire.announcement import encode_signed
from shardmesh.wire.commands import encode_data
from shardmesh.wire.limits import LOAD_INTERVAL_S

PROMISED_S = 0.3
ROUND_TRIP_S = 0.02
OTHERS = [new_identity() for _ in range(12)]
NODE = new_identity()
MOMENTS_S = [0.0, 0.013, 0.049, 0.051, 0.087, 0.099, 0.101, 0.149]


class Mesh:
    """A neighbour's directory, a gateway that follows it, and a node that can be asked."""

    def __init__(self) -> None:
        self.neighbour = Directory(CLUSTER)
        self.shard_state = "absent"
        self._own = Directory(CLUSTER)
        self._sequence = 0
        self._hub = EventHub()
        self._reports = NodeReports(
            cast(Host, self),
            self._own,
            is_seen=lambda: True,
            on_change=lambda: self._watch.touch(),
        )
        self._watch = MeshWatch(
            self._own, self._hub, reports=self._reports.reports, is_busy=lambda peer_id: False
        )

    def learn(self, peer_id: str, addresses: object) -> None:
        """As a host does."""

    async def request(self, peer_id: str, *_: object, **__: object) -> bytes:
        await trio.sleep(ROUND_TRIP_S)
        state = self.shard_state if peer_id == NODE.peer_id else "loaded"
        return encode_data({"shard_state": state})

    def announce(self, identity: Identity, *, shard_loaded: bool = True) -> None:
        self._sequence += 1
        told = an_announcement(
            identity,
            sequence=self._sequence,
            capabilities=capabilities(shard_loaded=shard_loaded),
        )
        self.neighbour.update(encode_signed(told, identity))

    async def chatter(self) -> None:
        """Other nodes announce their load as often as they may."""
        while True:
            for identity in OTHERS:
                self.announce(identity)
                await trio.sleep(LOAD_INTERVAL_S / len(OTHERS))

    @asynccontextmanager
    async def shown(self) -> AsyncIterator[Subscription]:
        """What a page is told, once it has heard of the others."""
        store = await open_event_store(None)
        console = Console(self._watch, SessionBoard(), self._hub, store, about={}, links={})
        teller, reader = byte_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.chatter)
            nursery.start_soon(tell_news, teller, self.neighbour)
            nursery.start_soon(take_in_news, reader, self._own, "neighbour", print)
            nursery.start_soon(self._reports.run)
            nursery.start_soon(console.run)
            await trio.sleep(2)
            with console.feed.subscribe() as news:
                yield news
            nursery.cancel_scope.cancel()
        await store.close()


async def seen_s(news: Subscription, state: str) -> float:
    """When the page shows the node in this state."""
    while True:
        message: dict[str, Any] = json.loads(await news.next())
        nodes = message.get("state", message.get("patch", {})).get("nodes", {})
        if nodes.get(NODE.peer_id, {}).get("state") == state:
            return trio.current_time()


async def told_s(news: Subscription, kind: str) -> float:
    """When the page is told of the event."""
    while True:
        message: dict[str, Any] = json.loads(await news.next())
        for event in message.get("events", ()):
            if event["kind"] == kind and event["data"]["peer_id"] == NODE.peer_id:
                return trio.current_time()


@pytest.fixture
def mock_clock() -> trio.testing.MockClock:
    """Jumps as soon as nothing is done, which leaves a thread the time that it needs."""
    return trio.testing.MockClock(autojump_threshold=0.005)


@pytest.mark.parametrize("moment_s", MOMENTS_S)
async def test_a_state_that_only_the_node_tells(
    mock_clock: trio.testing.MockClock, moment_s: float
) -> None:
    mesh = Mesh()
    async with mesh.shown() as news:
        mesh.announce(NODE, shard_loaded=False)
        await seen_s(news, "waiting")
        await trio.sleep(moment_s)
        for state in ("loading", "failed"):
            happened_s = trio.current_time()
            mesh.shard_state = state
            mesh.announce(NODE, shard_loaded=False)
            assert await seen_s(news, state) - happened_s < PROMISED_S


@pytest.mark.parametrize("moment_s", MOMENTS_S)
async def test_an_event(mock_clock: trio.testing.MockClock, moment_s: float) -> None:
    mesh = Mesh()
    mesh.shard_state = "loaded"
    async with mesh.shown() as news:
        await trio.sleep(moment_s)
        happened_s = trio.current_time()
        mesh.announce(NODE)
        assert await told_s(news, "shard.loaded") - happened_s < PROMISED_S


def test_how_long_a_node_is_not_asked_again() -> None:
    asked = an_announcement(NODE, sequence=5)
    idle, loading = Report(), Report(shard_state="loading")
    fetching = Report(downloads=(Download(name="a", n_bytes=9, n_bytes_done=1),))
    assert pause_s(asked, asked, idle, is_seen=True) == ASK_INTERVAL_S
    assert pause_s(asked, asked, loading, is_seen=True) == ASK_INTERVAL_MOVING_S
    assert pause_s(asked, asked, fetching, is_seen=True) == ASK_INTERVAL_MOVING_S
    assert pause_s(asked, asked, fetching, is_seen=False) == ASK_INTERVAL_UNSEEN_S
    newer = msgspec.structs.replace(asked, sequence=6)
    assert pause_s(newer, asked, None, is_seen=True) == NEWS_PAUSE_S
    assert NEWS_PAUSE_S < pause_s(newer, asked, None, is_seen=False) < ASK_INTERVAL_UNSEEN_S


@pytest.mark.parametrize(
    ("changes", "is_news"),
    [
        ({}, True),  # the same again: a download has begun
        ({"token_us": 900}, False),
        ({"round_trips_us": (("other", 7),), "memory_available_mb": 1}, False),
        ({"token_us": 900, "n_sessions": 1}, True),
        ({"token_us": 900, "shard_loaded": False}, True),
        ({"is_draining": True}, True),
    ],
)
def test_what_a_node_is_asked_about(changes: dict[str, Any], is_news: bool) -> None:
    known = an_announcement(NODE, sequence=5)
    told = msgspec.structs.replace(known.capabilities, **changes)
    newest = msgspec.structs.replace(known, sequence=6, capabilities=told)
    assert has_news(known, newest) is is_news
    assert not has_news(newest, newest)
