"""Dialing and accepting links: over real sockets, and over memory where time plays a part."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import pytest
import trio
import trio.testing
from support.accepting import WORD, accepting, hears_word, new_grants
from support.far_end import Recorder

import shardmesh.links.dial as dial_module
import shardmesh.links.link as link_module
from shardmesh.errors import BusyError, ShardmeshError, UnreachableError
from shardmesh.links.dial import (
    EXPECTED_LIFETIME_S,
    Acceptor,
    LinkPool,
    dial,
    local_endpoints,
)
from shardmesh.links.link import Link, LinkUser
from shardmesh.wire.limits import (
    ANNOUNCEMENT_ADDRESSES_MAX,
    DIAL_STAGGER_S,
    EXPECTED_LINKS_MAX,
    EXPECTED_LINKS_PER_NODE_MAX,
    HANDSHAKE_TIMEOUT_S,
    UNNAMED_CONNECTIONS_MAX,
)
from shardmesh.wire.link_agreement import Endpoint, LinkGrant, LinkRequester, answer_request


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_a_dialed_link_carries_messages() -> None:
    far_user = Recorder()
    async with accepting(far_user) as (acceptor, endpoints):
        grant, expected = new_grants(endpoints)
        acceptor.expect(expected)
        await hears_word(await dial(grant, Recorder()), far_user)


async def test_a_dead_endpoint_is_passed_over() -> None:
    far_user = Recorder()
    async with accepting(far_user) as (acceptor, endpoints):
        dead = Endpoint(host="127.0.0.1", port=unused_port())
        grant, expected = new_grants((dead, *endpoints))
        acceptor.expect(expected)
        await hears_word(await dial(grant, Recorder()), far_user)


async def test_no_endpoint_answers() -> None:
    grant, _ = new_grants((Endpoint(host="127.0.0.1", port=unused_port()),))
    with pytest.raises(UnreachableError) as caught:
        await dial(grant, Recorder())
    assert caught.value.code == "NO_LINK"
    assert "127.0.0.1" in str(caught.value)


async def test_a_link_that_was_not_offered_or_was_used_is_refused() -> None:
    far_user = Recorder()
    async with accepting(far_user) as (acceptor, endpoints):
        grant, expected = new_grants(endpoints)
        with pytest.raises(UnreachableError):
            await dial(grant, Recorder())
        acceptor.expect(expected)
        await hears_word(await dial(grant, Recorder()), far_user)
        with pytest.raises(UnreachableError):
            await dial(grant, Recorder())


async def test_the_right_name_with_wrong_keys_is_refused() -> None:
    async with accepting(Recorder()) as (acceptor, endpoints):
        grant, expected = new_grants(endpoints)
        other, _ = new_grants(endpoints)
        acceptor.expect(expected)
        thief = LinkGrant(grant.link_id, other.keys, grant.peer_id, grant.endpoints)
        with pytest.raises(UnreachableError):
            await dial(thief, Recorder())


async def test_a_dial_that_is_cancelled_leaves_no_connection() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        grant, _ = new_grants((Endpoint(host="127.0.0.1", port=listener.getsockname()[1]),))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dial, grant, Recorder())
            accepted, _ = await trio.to_thread.run_sync(listener.accept)
            with accepted:
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    stream = trio.SocketStream(trio.socket.from_stdlib_socket(accepted.dup()))
                    async with stream:
                        while await _reads(stream):
                            pass


async def test_a_dial_that_is_cancelled_just_after_the_greeting_leaves_no_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scope = trio.CancelScope()
    greet = dial_module._greeted

    async def greet_and_cancel(stream: trio.SocketStream, grant: LinkGrant, user: LinkUser) -> Link:
        link = await greet(stream, grant, user)
        scope.cancel()
        return link

    monkeypatch.setattr(dial_module, "_greeted", greet_and_cancel)
    far_user = Recorder()
    async with accepting(far_user) as (acceptor, endpoints):
        grant, expected = new_grants(endpoints)
        acceptor.expect(expected)
        with scope:
            await dial(grant, Recorder())
        assert scope.cancelled_caught
        assert (await far_user.end()).code == "LINK_LOST"


@pytest.mark.parametrize("n_silent", [1, 3])
async def test_an_endpoint_that_only_accepts_holds_up_nobody(n_silent: int) -> None:
    far_user = Recorder()
    with ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n_silent)
        ]
        async with accepting(far_user) as (acceptor, endpoints):
            dead = (Endpoint(host="127.0.0.1", port=each.getsockname()[1]) for each in silent)
            grant, expected = new_grants((*dead, *endpoints))
            acceptor.expect(expected)
            with trio.fail_after(n_silent * DIAL_STAGGER_S + HANDSHAKE_TIMEOUT_S / 2):
                link = await dial(grant, Recorder())
            await hears_word(link, far_user)


async def test_an_endpoint_that_only_accepts_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "HANDSHAKE_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        grant, _ = new_grants((Endpoint(host="127.0.0.1", port=silent.getsockname()[1]),))
        with pytest.raises(UnreachableError) as caught:
            await dial(grant, Recorder())
    assert caught.value.code == "NO_LINK"


async def test_after_a_failure_the_next_endpoint_is_dialed_at_once() -> None:
    far_user = Recorder()
    async with accepting(far_user) as (acceptor, endpoints):
        dead = [Endpoint(host="127.0.0.1", port=unused_port()) for _ in range(15)]
        grant, expected = new_grants((*dead, *endpoints))
        acceptor.expect(expected)
        with trio.fail_after(10 * DIAL_STAGGER_S):
            link = await dial(grant, Recorder())
        await hears_word(link, far_user)


async def test_of_two_ways_to_one_node_one_is_taken_and_the_other_closed() -> None:
    far_user = Recorder()
    async with accepting(far_user) as (acceptor, endpoints):
        grant, expected = new_grants((*endpoints, *endpoints, *endpoints))
        acceptor.expect(expected)
        await hears_word(await dial(grant, Recorder()), far_user)
        await far_user.end()


async def _reads(stream: trio.SocketStream) -> bytes:
    try:
        return bytes(await stream.receive_some(100))
    except trio.BrokenResourceError:
        return b""


# -- time, over memory -------------------------------------------------------------------------


async def refused_after_s(acceptor: Acceptor, stream: trio.abc.Stream) -> float:
    begun_s = trio.current_time()
    await acceptor.handle(stream)
    return trio.current_time() - begun_s


@pytest.mark.parametrize("n_link_id", [0, 1, 15])
async def test_a_slow_loris_is_closed(
    n_link_id: int, autojump_clock: trio.testing.MockClock
) -> None:
    near, far = trio.testing.memory_stream_pair()
    await far.send_all(bytes(n_link_id))
    assert await refused_after_s(Acceptor(Recorder()), near) == pytest.approx(HANDSHAKE_TIMEOUT_S)
    assert await far.receive_some(1) == b""


async def test_a_name_a_byte_a_second_and_then_nothing_gains_no_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    acceptor = Acceptor(Recorder())
    _, expected = new_grants()
    acceptor.expect(expected)
    near, far = trio.testing.memory_stream_pair()

    async def trickle() -> None:
        await far.send_all(expected.link_id[:12])
        for byte in expected.link_id[12:]:
            await trio.sleep(1)
            await far.send_all(bytes([byte]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trickle)
        assert await refused_after_s(acceptor, near) == pytest.approx(HANDSHAKE_TIMEOUT_S)


async def test_an_offer_lapses(autojump_clock: trio.testing.MockClock) -> None:
    acceptor = Acceptor(Recorder())
    _, expected = new_grants()
    acceptor.expect(expected)
    await trio.sleep(EXPECTED_LIFETIME_S + 0.1)
    near, far = trio.testing.memory_stream_pair()
    await far.send_all(expected.link_id)
    assert await refused_after_s(acceptor, near) == 0


async def test_offers_are_bounded_and_lapsed_ones_make_room(
    autojump_clock: trio.testing.MockClock,
) -> None:
    acceptor = Acceptor(Recorder())
    for number in range(EXPECTED_LINKS_MAX):
        acceptor.expect(grant_of(f"node-{number}"))
    with pytest.raises(BusyError):
        acceptor.expect(grant_of("one more"))
    await trio.sleep(EXPECTED_LIFETIME_S + 0.1)
    acceptor.expect(grant_of("one more"))


async def test_one_node_cannot_take_all_places() -> None:
    acceptor = Acceptor(Recorder())
    for _ in range(EXPECTED_LINKS_PER_NODE_MAX):
        acceptor.expect(grant_of("greedy"))
    with pytest.raises(BusyError):
        acceptor.expect(grant_of("greedy"))
    acceptor.expect(grant_of("another"))


def grant_of(peer_id: str) -> LinkGrant:
    return dataclasses.replace(new_grants()[1], peer_id=peer_id)


async def test_links_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial_module, "LINKS_MAX", 1)
    far_user = Recorder()
    async with accepting(far_user) as (acceptor, endpoints):
        grant, expected = new_grants(endpoints)
        acceptor.expect(expected)
        link = await dial(grant, Recorder())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run)
            link.send(WORD)
            await far_user.heard(1)
            with pytest.raises(BusyError):
                acceptor.expect(new_grants()[1])
            link.close()


async def test_beyond_the_bound_the_oldest_unnamed_connection_goes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    acceptor = Acceptor(Recorder())
    begun_s = trio.current_time()
    async with trio.open_nursery() as nursery:
        near, first = trio.testing.memory_stream_pair()
        nursery.start_soon(acceptor.handle, near)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(UNNAMED_CONNECTIONS_MAX - 1):
            nursery.start_soon(acceptor.handle, trio.testing.memory_stream_pair()[0])
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(acceptor.handle, trio.testing.memory_stream_pair()[0])
        await first.receive_some(1)  # closed to make room
        assert trio.current_time() - begun_s < 0.1
    assert await refused_after_s(acceptor, trio.testing.memory_stream_pair()[0]) == pytest.approx(
        HANDSHAKE_TIMEOUT_S
    )


# -- the pool ----------------------------------------------------------------------------------


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


def test_endpoints_are_the_ip_addresses_once_each() -> None:
    addresses = [
        "/ip4/192.0.2.1/tcp/4001/p2p/x",
        "/ip4/192.0.2.1/tcp/4002",
        "/ip6/2001:db8::1/tcp/4001",
        "/ip6/fe80::1%eth0/tcp/4001",
        "/dns/name.example/tcp/4001",
        "nonsense",
    ]
    assert local_endpoints(addresses, 7000) == (
        Endpoint(host="192.0.2.1", port=7000),
        Endpoint(host="2001:db8::1", port=7000),
    )


def test_a_machine_with_many_addresses_offers_as_many_as_are_taken() -> None:
    """Networks of containers and short-lived IPv6 addresses: a long offer would be refused."""
    addresses = [f"/ip4/10.0.{n}.1/tcp/4001" for n in range(3 * ANNOUNCEMENT_ADDRESSES_MAX)]
    requester = LinkRequester("near", "far")
    offer, _ = answer_request(
        requester.request(),
        own_peer_id="far",
        other_peer_id="near",
        endpoints=local_endpoints(addresses, 7000),
    )
    endpoints = requester.grant(offer).endpoints
    assert [endpoint.host for endpoint in endpoints[:2]] == ["10.0.0.1", "10.0.1.1"]
    assert len(endpoints) == ANNOUNCEMENT_ADDRESSES_MAX
