"""A listener that was thought to be gone is looked for, as long as its word about itself holds."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest
import trio
import trio.testing
from support.announcements import CLUSTER, an_announcement

from shardmesh.errors import UnreachableError
from shardmesh.swarm.connections import ConnectionEvent
from shardmesh.swarm.directory import Directory
from shardmesh.swarm.host import Host
from shardmesh.swarm.identity import new_identity
from shardmesh.swarm.neighbours import Neighbours, failure_level
from shardmesh.swarm.remembered import RememberedNodes
from shardmesh.wire.announcement import encode_signed
from shardmesh.wire.defaults import DEFAULT_BOOTSTRAP

ALICE = new_identity()
BUSY_S = 60.0
DIAL_TIMEOUT_S = 5.0
RIGHT_WITHIN_S = 10.0


class OneNode:
    """A host whose only neighbour cannot be reached before some moment."""

    peer_id = "me"
    neighbours: Neighbours

    def __init__(self, back_s: float, dial_s: float) -> None:
        self.n_dials = 0
        self._back_s = back_s
        self._dial_s = dial_s
        self._connected: set[str] = set()
        self._listener: Callable[[ConnectionEvent], None] = print

    def learn(self, peer_id: str, addresses: object) -> None:
        """As a host does."""

    def keep_connections(self, wanted: Callable[[str], bool]) -> None:
        """As a host does."""

    def on_connection(self, listener: Callable[[ConnectionEvent], None]) -> None:
        self._listener = listener

    def connected(self) -> list[str]:
        return sorted(self._connected)

    async def connect(self, addresses: object, timeout_s: float) -> str:
        self.n_dials += 1
        await trio.sleep(self._dial_s)
        if trio.current_time() < self._back_s:
            await trio.sleep(DIAL_TIMEOUT_S)
            raise UnreachableError("no answer")
        self._connected.add(ALICE.peer_id)
        return ALICE.peer_id

    def lose(self, *, was_silent: bool, has_another: bool = False) -> None:
        self._connected = {ALICE.peer_id} if has_another else set()
        event = ConnectionEvent(
            peer_id=ALICE.peer_id,
            address="",
            direction="outbound",
            kind="closed",
            was_silent=was_silent,
        )
        self._listener(event)


@asynccontextmanager
async def losing(back_s: float, dial_s: float = 0.5) -> AsyncIterator[tuple[OneNode, Directory]]:
    host, directory = OneNode(back_s, dial_s), Directory(CLUSTER)
    directory.update(encode_signed(an_announcement(ALICE), ALICE))
    host.neighbours = Neighbours(
        cast(Host, host),
        directory,
        bootstraps=(),
        remembered=RememberedNodes(None),
        logger=logging.getLogger("test"),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.neighbours.recheck_lost)
        yield host, directory
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("was_silent", [False, True])
async def test_a_node_that_was_only_busy_is_found_again(
    autojump_clock: trio.testing.MockClock, was_silent: bool
) -> None:
    """It has not noticed that anybody missed it, and says nothing new."""
    async with losing(BUSY_S) as (host, directory):
        host.lose(was_silent=was_silent)
        await trio.sleep(10)
        assert directory.get(ALICE.peer_id) is None
        await trio.sleep(BUSY_S - 10 + RIGHT_WITHIN_S)
        assert directory.get(ALICE.peer_id) is not None
        n_dials = host.n_dials
        await trio.sleep(1000)
        assert host.n_dials == n_dials, "it is there; nobody looks for it any more"


async def test_a_node_is_there_as_long_as_one_connection_with_it_is(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with losing(BUSY_S) as (host, directory):
        host.lose(was_silent=True, has_another=True)
        await trio.sleep(20)
        assert directory.get(ALICE.peer_id) is not None
        assert host.n_dials == 0
        host.lose(was_silent=True)
        await trio.sleep(1)
        assert directory.get(ALICE.peer_id) is None
        await trio.sleep(BUSY_S - 21 + RIGHT_WITHIN_S)
        assert directory.get(ALICE.peer_id) is not None


async def test_one_that_others_hid_is_looked_for_when_its_connection_is_lost(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with losing(0) as (host, directory):
        directory.mark_unreachable(ALICE.peer_id)
        host.lose(was_silent=False)
        await trio.sleep(1)
        assert directory.get(ALICE.peer_id) is not None


async def test_a_node_that_stays_away_is_given_up_with_its_announcement(
    autojump_clock: trio.testing.MockClock,
) -> None:
    now_s = 0.0
    async with losing(float("inf")) as (host, directory):
        now_s = directory.wall_clock()
        directory.wall_clock = lambda: now_s + trio.current_time()
        host.lose(was_silent=False)
        await trio.sleep(700)
        n_dials = host.n_dials
        assert 50 < n_dials < 150, "every few seconds"
        await trio.sleep(1000)
        assert host.n_dials == n_dials


async def test_a_dial_that_takes_long_is_not_given_up_when_the_node_is_hidden(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with losing(0, dial_s=6) as (host, directory):
        host.lose(was_silent=False)
        await trio.sleep(5)
        assert directory.get(ALICE.peer_id) is None
        await trio.sleep(2)
        assert directory.get(ALICE.peer_id) is not None
        assert host.n_dials == 1


async def test_one_that_connects_while_it_is_dialed_is_not_hidden(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with losing(0, dial_s=8) as (host, directory):
        host.lose(was_silent=True)
        await trio.sleep(2)
        host._connected.add(ALICE.peer_id)
        directory.mark_reachable(ALICE.peer_id)
        await trio.sleep(4)
        assert directory.get(ALICE.peer_id) is not None


async def test_one_that_is_back_by_itself_is_not_dialed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with losing(float("inf")) as (host, directory):
        host.lose(was_silent=True)
        await trio.sleep(20)
        directory.mark_reachable(ALICE.peer_id)
        host._connected.add(ALICE.peer_id)
        await trio.sleep(60)
        n_dials = host.n_dials
        await trio.sleep(1000)
        assert host.n_dials == n_dials


async def test_who_asks_whether_a_node_is_there_does_not_wait_until_it_is_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with losing(back_s=BUSY_S) as (host, directory):
        with trio.fail_after(RIGHT_WITHIN_S):
            await host.neighbours.check([ALICE.peer_id])
        assert directory.get(ALICE.peer_id) is None
        await trio.sleep(BUSY_S + RIGHT_WITHIN_S)  # it is looked for all the same
        assert directory.get(ALICE.peer_id) is not None


async def test_a_listener_is_met_once_for_each_connection_however_often_it_speaks(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A node that is busy says each second how busy it is, and all others hear it."""
    met: list[str] = []

    async def connected(peer_id: str) -> None:
        met.append(peer_id)

    def speak(sequence: int) -> None:
        directory.update(encode_signed(an_announcement(ALICE, sequence=sequence), ALICE))

    async with losing(0) as (host, directory), trio.open_nursery() as nursery:
        nursery.start_soon(host.neighbours.stay_with_listeners, connected)
        for sequence in range(2, 22):
            speak(sequence)
            await trio.sleep(1.1)
        assert met == [ALICE.peer_id]
        host.lose(was_silent=False)
        speak(22)
        await trio.sleep(5)
        assert met == 2 * [ALICE.peer_id]
        nursery.cancel_scope.cancel()


def test_a_bootstrap_that_nobody_named_is_missed_only_where_nobody_else_is() -> None:
    named, default = ["/ip4/192.0.2.1/tcp/51820"], [DEFAULT_BOOTSTRAP]
    assert failure_level(default, ["somebody"]) == logging.DEBUG
    assert failure_level(default, []) == logging.WARNING
    assert failure_level(named, ["somebody"]) == logging.WARNING
