"""Dialing and accepting links: over real sockets, and over memory where time plays a part."""

from __future__ import annotations

import dataclasses
import socket
from contextlib import ExitStack

import pytest
import trio
import trio.testing
from support.accepting import WORD, accepting, hears_word, new_grants
from support.far_end import Recorder

import shardmesh.links.dial as dial_module
import shardmesh.links.link as link_module
from shardmesh.errors import BusyError, UnreachableError
from shardmesh.links.dial import EXPECTED_LIFETIME_S, Acceptor, dial, local_endpoints
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


# -- endpoints -------------------------------------------------------------------------------


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
