"""Nodes that cannot be dialed: dialing back, places on a relay, connections through it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from shardmesh.errors import BusyError, RefusedError, ShardmeshError, UnreachableError
from shardmesh.swarm import relay as relay_module
from shardmesh.swarm.addresses import circuit_addresses, is_circuit, parse_address, with_peer_id
from shardmesh.swarm.admission import Admission
from shardmesh.swarm.host import ByteStream, Host, open_host
from shardmesh.swarm.identity import new_identity
from shardmesh.swarm.reach import (
    Reach,
    ask_to_dial_back,
    can_be_reached,
    pause_s_after,
    serve_dial_back,
)
from shardmesh.swarm.relay import Pace, Relay, reserve
from shardmesh.swarm.streams import receive_message, send_message
from shardmesh.wire.cluster_secret import new_secret
from shardmesh.wire.limits import REACH_INTERVAL_S
from shardmesh.wire.relay import DialBackAnswer

ECHO = "/shardmesh/test/echo/1.0"


async def echo(stream: ByteStream, peer_id: str) -> None:
    await send_message(stream, await receive_message(stream, 4 * 1024 * 1024))


async def ask(asker: Host, peer_id: str, payload: bytes) -> bytes:
    return await asker.request(peer_id, ECHO, payload, timeout_s=10, response_bytes_max=1 << 22)


@asynccontextmanager
async def hosts(n_hosts: int, admission: Admission | None = None) -> AsyncIterator[list[Host]]:
    async with AsyncExitStack() as stack:
        made = []
        for _ in range(n_hosts):
            opening = open_host(
                new_identity(),
                listen_host="127.0.0.1",
                admission=admission or Admission(None),
            )
            made.append(await stack.enter_async_context(opening))
        yield made


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not holds():  # noqa: ASYNC110 - the far side tells nobody when it is done
            await trio.sleep(0.01)


async def take_place(host: Host, relay: Host) -> list[str]:
    """Makes the host reachable through the relay only; its addresses."""
    await host.connect(relay.addresses(), 5)
    given = await reserve(host, relay.peer_id)
    known = host.known_addresses(relay.peer_id)
    host.hide()
    host.come_through({relay.peer_id}, circuit_addresses(relay.peer_id, known, given.addresses))
    return host.addresses()


async def test_a_node_with_a_place_is_called_through_the_relay() -> None:
    async with hosts(3) as (relay, hidden, caller):
        Relay(relay).serve()
        hidden.serve(ECHO, echo)
        addresses = await take_place(hidden, relay)
        assert addresses
        assert all(is_circuit(a) for a in addresses)
        with trio.fail_after(10):
            assert await caller.connect(addresses, 5) == hidden.peer_id
            assert caller.is_relayed(hidden.peer_id)
            assert hidden.is_relayed(caller.peer_id)
            assert not hidden.is_relayed(relay.peer_id)
            large = bytes(range(256)) * 4096
            assert await ask(caller, hidden.peer_id, large) == large


async def test_a_known_circuit_address_is_dialed_for_a_stream() -> None:
    async with hosts(3) as (relay, hidden, caller):
        Relay(relay).serve()
        hidden.serve(ECHO, echo)
        caller.learn(hidden.peer_id, await take_place(hidden, relay))
        assert await ask(caller, hidden.peer_id, b"hello") == b"hello"


async def test_direct_addresses_are_preferred_to_the_relay() -> None:
    async with hosts(3) as (relay, node, caller):
        Relay(relay).serve()
        await node.connect(relay.addresses(), 5)
        given = await reserve(node, relay.peer_id)
        circuits = circuit_addresses(relay.peer_id, given.addresses, ())
        assert node.come_through({relay.peer_id}, circuits)
        assert is_circuit(node.addresses()[-1])
        await caller.connect(list(reversed(node.addresses())), 5)
        assert not caller.is_relayed(node.peer_id)


async def test_the_relay_proves_nothing_the_ends_prove_themselves() -> None:
    async with hosts(3) as (relay, hidden, caller):
        Relay(relay).serve()
        circuits = await take_place(hidden, relay)
        other = new_identity().peer_id
        wrong = [with_peer_id(circuits[0], other)]
        with pytest.raises(UnreachableError):
            await caller.connect(wrong, 5)
        with pytest.raises(UnreachableError):  # the handshake tells them apart, not the relay
            await caller.connect([str(parse_address(circuits[0])[0])], 5)


async def test_who_has_no_place_cannot_be_called_and_is_not_dialed() -> None:
    async with hosts(3) as (relay, hidden, caller):
        Relay(relay).serve()
        circuits = await take_place(hidden, relay)
        relay.learn(hidden.peer_id, hidden.direct_addresses())
        await hidden.disconnect(relay.peer_id, "for the test")
        await until(lambda: hidden.peer_id not in relay.connected())
        with pytest.raises(UnreachableError, match="no place"):
            await caller.connect(circuits, 5)
        assert hidden.peer_id not in relay.connected()


async def test_a_node_takes_no_calls_through_a_relay_that_it_has_not_chosen() -> None:
    async with hosts(3) as (relay, hidden, caller):
        Relay(relay).serve()
        circuits = await take_place(hidden, relay)
        hidden.come_through(set(), ())
        with pytest.raises(UnreachableError):
            await caller.connect(circuits, 5)
        assert caller.connected() == [relay.peer_id]


async def test_no_circuit_through_a_circuit() -> None:
    async with hosts(3) as (relay, hidden, caller):
        Relay(relay).serve()
        Relay(hidden).serve()
        await caller.connect(await take_place(hidden, relay), 5)
        with pytest.raises(ShardmeshError, match="direct connection"):
            await reserve(caller, hidden.peer_id)


async def test_one_place_more_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "RELAY_RESERVATIONS_MAX", 1)
    async with hosts(3) as (relay, one, other):
        served = Relay(relay)
        served.serve()
        await take_place(one, relay)
        await take_place(one, relay)  # renewing takes no second one
        await other.connect(relay.addresses(), 5)
        with pytest.raises(BusyError):
            await reserve(other, relay.peer_id)
        await one.disconnect(relay.peer_id, "for the test")
        await until(lambda: not served.n_reservations)
        await reserve(other, relay.peer_id)


async def test_one_circuit_more_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "RELAY_CIRCUITS_PER_NODE_MAX", 1)
    async with hosts(4) as (relay, hidden, one, other):
        served = Relay(relay)
        served.serve()
        circuits = await take_place(hidden, relay)
        await one.connect(circuits, 5)
        with pytest.raises(UnreachableError, match="as many"):
            await other.connect(circuits, 5)
        await one.disconnect(hidden.peer_id, "for the test")
        await until(lambda: not served.n_circuits)
        await other.connect(circuits, 5)


async def test_a_place_lapses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "RELAY_RESERVATION_S", 1)
    async with hosts(3) as (relay, hidden, caller):
        served = Relay(relay)
        served.serve()
        circuits = await take_place(hidden, relay)
        await until(lambda: not served.n_reservations)
        with pytest.raises(UnreachableError, match="no place"):
            await caller.connect(circuits, 5)


async def test_a_private_mesh_is_private_through_a_relay() -> None:
    secret = new_secret(new_identity().public_key)
    async with hosts(2, Admission(secret)) as (relay, hidden), hosts(1) as (stranger,):
        Relay(relay).serve()
        circuits = await take_place(hidden, relay)
        with pytest.raises(RefusedError):
            await stranger.connect(circuits, 5)
        with pytest.raises(RefusedError):
            await stranger.connect(relay.addresses(), 5)


async def test_the_end_of_the_relay_is_the_end_of_its_circuits() -> None:
    async with hosts(2) as (hidden, caller):
        async with hosts(1) as (relay,):
            Relay(relay).serve()
            await caller.connect(await take_place(hidden, relay), 5)
        await until(lambda: hidden.peer_id not in caller.connected())
        await until(lambda: caller.peer_id not in hidden.connected())


async def test_the_pace_of_a_circuit(autojump_clock: trio.testing.MockClock) -> None:
    pace = Pace(1000)
    started_s = trio.current_time()
    await pace(1000)  # what a pause has saved up
    for _ in range(5):
        await pace(1000)
    assert 4.9 < trio.current_time() - started_s < 5.1


# -- dialing back ------------------------------------------------------------------------------


async def test_a_node_is_dialed_back_where_it_is_seen() -> None:
    async with hosts(2) as (asker, observer):
        serve_dial_back(observer)
        await asker.connect(observer.addresses(), 5)
        (port,) = asker.own_ports()
        free = port + 1 if port < 65535 else port - 1
        answer = await ask_to_dial_back(asker, observer.peer_id, [port, free])
        assert answer == DialBackAnswer(host="127.0.0.1", reached=(port,))


async def test_another_node_on_the_port_does_not_count() -> None:
    async with hosts(3) as (asker, observer, third):
        serve_dial_back(observer)
        await asker.connect(observer.addresses(), 5)
        answer = await ask_to_dial_back(asker, observer.peer_id, third.own_ports())
        assert answer.reached == ()


async def test_asking_twice_in_a_row_is_refused() -> None:
    async with hosts(2) as (asker, observer):
        serve_dial_back(observer)
        await asker.connect(observer.addresses(), 5)
        await ask_to_dial_back(asker, observer.peer_id, asker.own_ports())
        with pytest.raises(ShardmeshError):
            await ask_to_dial_back(asker, observer.peer_id, asker.own_ports())


async def test_who_comes_through_a_relay_is_not_dialed() -> None:
    async with hosts(3) as (relay, hidden, caller):
        Relay(relay).serve()
        serve_dial_back(hidden)
        await caller.connect(await take_place(hidden, relay), 5)
        with pytest.raises(ShardmeshError):
            await ask_to_dial_back(caller, hidden.peer_id, caller.own_ports())


def test_what_the_answers_mean() -> None:
    yes, no = DialBackAnswer(host="::1", reached=(1,)), DialBackAnswer(host="::1", reached=())
    assert can_be_reached([]) is None
    assert can_be_reached([yes, yes]) is True
    assert can_be_reached([yes, no]) is False


def test_who_got_no_answer_asks_again_soon() -> None:
    pauses_s = [pause_s_after(n) for n in range(1, 10_000)]
    assert pauses_s[:3] == [1.0, 2.0, 4.0]
    assert pauses_s == sorted(pauses_s)
    assert pause_s_after(0) == REACH_INTERVAL_S


# -- the whole of it ---------------------------------------------------------------------------


class Told:
    """Counts changes of a node's addresses."""

    def __init__(self) -> None:
        self.n_changes = 0
        self._changed = trio.Event()

    def __call__(self) -> None:
        self.n_changes += 1
        self._changed.set()
        self._changed = trio.Event()

    async def wait(self, n_changes: int) -> None:
        with trio.fail_after(10):
            while self.n_changes < n_changes:
                await self._changed.wait()


async def test_an_unreachable_node_takes_a_place_and_gives_it_up_when_it_is_reachable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    can_dial = False

    async def probe(self: Host, host: str, port: int, peer_id: str) -> bool:
        return can_dial

    monkeypatch.setattr(Host, "probe", probe)
    monkeypatch.setattr("shardmesh.swarm.reach.DIAL_BACK_PAUSE_S", 0.0)
    async with hosts(2) as (relay, node):
        Relay(relay).serve()
        serve_dial_back(relay)
        told = Told()
        reach = Reach(node, neighbours=node.connected, changed=told, interval_s=0.2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reach.run)
            await node.connect(relay.addresses(), 5)
            await told.wait(1)
            assert reach.is_reachable is False
            assert is_circuit(node.addresses()[-1])
            assert not is_circuit(node.addresses()[0])  # its own still come first
            can_dial = True
            await told.wait(2)
            assert reach.is_reachable is True
            assert not is_circuit(node.addresses()[-1])
            nursery.cancel_scope.cancel()


async def test_a_lost_relay_is_replaced_by_another() -> None:
    async with hosts(2) as (node, second):
        Relay(second).serve()
        node.hide()
        told = Told()
        reach = Reach(node, neighbours=node.connected, changed=told)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reach.run)
            async with hosts(1) as (first,):
                Relay(first).serve()
                serve_dial_back(first)
                await node.connect(first.addresses(), 5)
                await told.wait(1)
                assert all(first.peer_id in address for address in node.addresses())
                await node.connect(second.addresses(), 5)
            await told.wait(2)
            assert all(second.peer_id in address for address in node.addresses())
            nursery.cancel_scope.cancel()
