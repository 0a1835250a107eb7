"""The pool of links: one for each node, shared, dialed anew when it is silent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from support.accepting import accepting, new_grants
from support.far_end import Recorder

from shardmesh.errors import BusyError, ShardmeshError, UnreachableError
from shardmesh.links.dial import Acceptor, LinkPool
from shardmesh.links.link import Link
from shardmesh.wire.link_agreement import Endpoint, LinkGrant


class Agreements:
    """Stands for the agreement over libp2p; counts, and waits or fails as told."""

    def __init__(self, acceptor: Acceptor, endpoints: tuple[Endpoint, ...]) -> None:
        self.n_asked = 0
        self.failure: ShardmeshError | None = None
        self.may_go = trio.Event()
        self.may_go.set()
        self._acceptor, self._endpoints = acceptor, endpoints

    async def __call__(self, peer_id: str, addresses: tuple[str, ...]) -> LinkGrant:
        self.n_asked += 1
        await self.may_go.wait()
        if self.failure is not None:
            raise self.failure
        grant, expected = new_grants(self._endpoints)
        self._acceptor.expect(expected)
        return grant


@asynccontextmanager
async def pooled() -> AsyncIterator[tuple[LinkPool, Agreements, Recorder]]:
    far_user, user = Recorder(), Recorder()
    async with accepting(far_user) as (acceptor, endpoints):
        agreements = Agreements(acceptor, endpoints)
        async with trio.open_nursery() as nursery:
            yield LinkPool(nursery, agreements, user), agreements, user
            nursery.cancel_scope.cancel()


async def test_all_who_ask_at_once_share_one_link() -> None:
    async with pooled() as (pool, agreements, _):
        found: list[Link] = []

        async def ask() -> None:
            found.append(await pool.get("far", (), 5))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
        assert len(set(map(id, found))) == 1
        assert await pool.get("far", (), 5) is found[0]
        assert agreements.n_asked == 1


async def test_a_dead_link_is_replaced() -> None:
    async with pooled() as (pool, agreements, user):
        first = await pool.get("far", (), 5)
        first.close()
        second = await pool.get("far", (), 5)
        assert second is not first
        assert second.is_open
        assert agreements.n_asked == 2
        await user.end()
        assert await pool.get("far", (), 5) is second


async def test_a_silent_link_is_left_to_those_who_use_it_and_dialed_anew_for_others() -> None:
    async with pooled() as (pool, agreements, _):
        first = await pool.get("far", (), 5)
        first.is_suspected = True
        second = await pool.get("far", (), 5)
        assert (second is first, first.is_open) == (False, True)
        first.is_suspected = False
        assert await pool.get("far", (), 5) is second
        assert pool.links() == [second]

        second.is_suspected = True
        third = await pool.get("far", (), 5)
        assert (first.is_open, second.is_open, third.is_open) == (False, True, True)
        assert agreements.n_asked == 3
        pool.cut_off(["far"])
        assert (second.is_open, third.is_open) == (False, False)


async def test_a_node_is_dialed_soon_unless_it_is_linked() -> None:
    async with pooled() as (pool, agreements, _):
        pool.dial_soon("far", (), 5)
        link = await pool.get("far", (), 5)
        pool.dial_soon("far", (), 5)
        await trio.testing.wait_all_tasks_blocked()
        assert agreements.n_asked == 1
        assert pool.open_link("far") is link


async def test_whoever_needs_a_link_does_not_wait_long_for_a_dial_that_hangs() -> None:
    async with pooled() as (pool, agreements, _):
        agreements.may_go = trio.Event()
        pool.dial_soon("far", (), 60)
        await trio.testing.wait_all_tasks_blocked()
        agreements.may_go = trio.Event()  # the next one does not hang
        agreements.may_go.set()
        with trio.fail_after(30):
            link = await pool.get("far", (), 20)
        assert (link.is_open, agreements.n_asked) == (True, 2)


async def test_a_silent_node_is_dialed_while_nobody_waits_once_at_a_time() -> None:
    async with pooled() as (pool, agreements, _):
        first = await pool.get("far", (), 5)
        first.is_suspected = True
        agreements.may_go = trio.Event()
        for _ in range(3):
            pool.dial_soon("far", (), 5)
            await trio.testing.wait_all_tasks_blocked()
        assert agreements.n_asked == 2
        assert pool.open_link("far") is first
        agreements.may_go.set()
        second = await pool.get("far", (), 5)
        assert second is not first
        assert agreements.n_asked == 2

        second.is_suspected = True
        agreements.failure = UnreachableError("nobody")
        pool.dial_soon("far", (), 5)
        await trio.testing.wait_all_tasks_blocked()
        assert pool.open_link("far") is second


async def test_a_failed_agreement_is_raised_to_each_and_not_remembered() -> None:
    async with pooled() as (pool, agreements, _):
        agreements.failure = BusyError("no room")
        for _ in range(2):
            with pytest.raises(BusyError):
                await pool.get("far", (), 5)
        agreements.failure = None
        assert (await pool.get("far", (), 5)).is_open


async def test_an_asker_that_is_cancelled_leaves_the_next_to_dial() -> None:
    async with pooled() as (pool, agreements, _):
        agreements.may_go = trio.Event()
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def ask_and_leave() -> None:
                with scope:
                    await pool.get("far", (), 5)

            nursery.start_soon(ask_and_leave)
            await trio.testing.wait_all_tasks_blocked()
            found: list[Link] = []

            async def ask() -> None:
                found.append(await pool.get("far", (), 5))

            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            agreements.may_go.set()
        assert found[0].is_open
        assert agreements.n_asked == 2


async def test_nothing_is_kept_of_nodes_that_are_not_reached() -> None:
    async with pooled() as (pool, agreements, _):
        agreements.failure = UnreachableError("nobody")
        for number in range(10):
            with pytest.raises(UnreachableError):
                await pool.get(f"far-{number}", (), 5)
        assert not pool._dialing


async def test_an_agreement_that_takes_too_long(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        agreements = Agreements(Acceptor(Recorder()), ())
        agreements.may_go = trio.Event()
        with pytest.raises(UnreachableError) as caught:
            await LinkPool(nursery, agreements, Recorder()).get("far", (), 3)
        assert caught.value.code == "LINK_TIMEOUT"


async def test_closing_the_pool_ends_its_links() -> None:
    async with pooled() as (pool, _, user):
        link = await pool.get("far", (), 5)
        pool.close()
        await user.end()
        assert not link.is_open
