"""Hosts on loopback: real sockets, one process."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import cast

import pytest
import trio
from libp2p.peer.id import ID

from shardmesh.errors import InputError, ProtocolError, RefusedError, UnreachableError
from shardmesh.swarm.addresses import check_port, parse_address
from shardmesh.swarm.host import ByteStream, ConnectionEvent, Host, open_host
from shardmesh.swarm.identity import Identity, new_identity
from shardmesh.swarm.pulse import Pulse
from shardmesh.swarm.streams import receive_message, send_message
from shardmesh.swarm.transport import MeshSwarm
from shardmesh.wire.limits import CONNECTIONS_PER_NODE_MAX

ECHO = "/shardmesh/test/echo/1.0"


@asynccontextmanager
async def host_on_loopback(identity: Identity | None = None, port: int = 0) -> AsyncIterator[Host]:
    async with open_host(identity or new_identity(), listen_host="127.0.0.1", port=port) as host:
        yield host


async def echo(stream: ByteStream, peer_id: str) -> None:
    await send_message(stream, await receive_message(stream, 4 * 1024 * 1024))


async def ask(asker: Host, peer_id: str, payload: bytes, n_bytes_max: int = 1 << 22) -> bytes:
    return await asker.request(peer_id, ECHO, payload, timeout_s=5, response_bytes_max=n_bytes_max)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_request_is_answered() -> None:
    async with host_on_loopback() as asker, host_on_loopback() as answerer:
        answerer.serve(ECHO, echo)
        assert await asker.connect(answerer.addresses(), 5) == answerer.peer_id
        assert await ask(asker, answerer.peer_id, b"hello") == b"hello"
        assert await ask(asker, answerer.peer_id, b"") == b""
        large = bytes(range(256)) * 8192
        assert await ask(asker, answerer.peer_id, large) == large


async def test_bare_address_tells_who_answers() -> None:
    async with host_on_loopback() as asker, host_on_loopback() as answerer:
        answerer.serve(ECHO, echo)
        bare = answerer.addresses()[0].partition("/p2p/")[0]
        assert await asker.connect([bare], 5) == answerer.peer_id
        assert await ask(asker, answerer.peer_id, b"hello") == b"hello"


async def test_who_was_dialed_at_an_address_is_not_dialed_there_again() -> None:
    async with host_on_loopback() as asker, host_on_loopback() as answerer:
        told: list[ConnectionEvent] = []
        asker.on_connection(told.append)
        bare = answerer.addresses()[0].partition("/p2p/")[0]
        for _ in range(2):
            assert await asker.connect([bare], 5) == answerer.peer_id
        assert [event.kind for event in told] == ["established"]


async def test_wrong_peer_id_is_refused() -> None:
    async with host_on_loopback() as asker, host_on_loopback() as answerer:
        bare = answerer.addresses()[0].partition("/p2p/")[0]
        with pytest.raises(UnreachableError):
            await asker.connect([f"{bare}/p2p/{new_identity().peer_id}"], 5)
        assert asker.connected() == []


async def say_hello_in_http(stream: trio.SocketStream) -> None:
    await stream.send_all(b"HTTP/1.1 400 Bad Request\r\nServer: " + b"x" * 200 + b"\r\n\r\n")
    await stream.aclose()


async def test_what_was_dialed_by_mistake_is_said_in_words(nursery: trio.Nursery) -> None:
    serve = partial(trio.serve_tcp, say_hello_in_http, 0, host="127.0.0.1")
    (web_server,) = await nursery.start(serve)
    port = web_server.socket.getsockname()[1]
    hang_up = partial(trio.serve_tcp, trio.SocketStream.aclose, 0, host="127.0.0.1")
    (silent,) = await nursery.start(hang_up)
    async with host_on_loopback() as asker, host_on_loopback() as answerer:
        other = new_identity().peer_id
        bare = answerer.addresses()[0].partition("/p2p/")[0]
        for address, sentence in (
            (f"/ip4/127.0.0.1/tcp/{port}", "what answers there is no node"),
            (
                f"/ip4/127.0.0.1/tcp/{silent.socket.getsockname()[1]}",
                "the connection was closed before it was said who answers",
            ),
            (f"{bare}/p2p/{other}", f"another node answers there, {answerer.peer_id}$"),
            (f"/dns4/localhost/tcp/{port}", "an IP address is needed"),
        ):
            with pytest.raises(UnreachableError, match=sentence):
                await asker.connect([address], 5)
    nursery.cancel_scope.cancel()


async def test_oversize_answer_is_refused() -> None:
    async with host_on_loopback() as asker, host_on_loopback() as answerer:
        answerer.serve(ECHO, echo)
        await asker.connect(answerer.addresses(), 5)
        with pytest.raises(ProtocolError, match="at most 10"):
            await ask(asker, answerer.peer_id, b"x" * 11, n_bytes_max=10)
        assert await ask(asker, answerer.peer_id, b"x" * 10, n_bytes_max=10) == b"x" * 10


async def test_failing_handler_does_not_end_the_host(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(stream: ByteStream, peer_id: str) -> None:
        raise ZeroDivisionError("a defect")

    async with host_on_loopback() as asker, host_on_loopback() as answerer:
        answerer.serve(ECHO, fail)
        await asker.connect(answerer.addresses(), 5)
        for _ in range(3):
            with pytest.raises(UnreachableError):
                await ask(asker, answerer.peer_id, b"hello")
        answerer.serve(ECHO, echo)
        assert await ask(asker, answerer.peer_id, b"hello") == b"hello"
    assert "the handler of" in caplog.text


async def test_a_handler_that_waited_in_vain_is_no_defect(caplog: pytest.LogCaptureFixture) -> None:
    async def wait(stream: ByteStream, peer_id: str) -> None:
        raise trio.TooSlowError

    async with host_on_loopback() as asker, host_on_loopback() as answerer:
        answerer.serve(ECHO, wait)
        await asker.connect(answerer.addresses(), 5)
        with pytest.raises(UnreachableError):
            await ask(asker, answerer.peer_id, b"hello")
    assert "the handler of" not in caplog.text


async def test_unknown_protocol_is_refused() -> None:
    async with host_on_loopback() as asker, host_on_loopback() as answerer:
        await asker.connect(answerer.addresses(), 5)
        with pytest.raises(RefusedError, match="does not speak"):
            await ask(asker, answerer.peer_id, b"hello")


async def test_cancelled_request_cancels_the_handler_and_nothing_else() -> None:
    started, cancelled = trio.Event(), trio.Event()

    async def wait_for_ever(stream: ByteStream, peer_id: str) -> None:
        await receive_message(stream, 100)
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with host_on_loopback() as asker, host_on_loopback() as answerer:
        answerer.serve("/slow", wait_for_ever)
        answerer.serve(ECHO, echo)
        await asker.connect(answerer.addresses(), 5)
        async with trio.open_nursery() as nursery:

            async def ask_slow() -> None:
                await asker.request(
                    answerer.peer_id, "/slow", b"x", timeout_s=60, response_bytes_max=100
                )

            nursery.start_soon(ask_slow)
            with trio.fail_after(5):
                await started.wait()
            nursery.cancel_scope.cancel()
        with trio.fail_after(5):
            await cancelled.wait()
        assert await ask(asker, answerer.peer_id, b"still there") == b"still there"


async def test_dead_address_then_live_one() -> None:
    async with host_on_loopback() as asker, host_on_loopback() as answerer:
        dead = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{answerer.peer_id}"
        assert await asker.connect([dead, *answerer.addresses()], 5) == answerer.peer_id


async def test_a_second_attempt_gets_through_where_the_first_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shardmesh.swarm.transport._DIAL_AGAIN_S", 0.1)
    n_dialed = 0
    async with host_on_loopback() as asker, host_on_loopback() as answerer:
        port = answerer.own_ports()[0]

        async def lead_on(stream: trio.SocketStream) -> None:
            nonlocal n_dialed
            n_dialed += 1
            if n_dialed == 1:
                await trio.sleep_forever()  # its packets are lost
            there = await trio.open_tcp_stream("127.0.0.1", port)
            async with there, trio.open_nursery() as pair:
                pair.start_soon(carry, stream, there)
                pair.start_soon(carry, there, stream)

        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, lead_on, [listener])
            entrance = listener.socket.getsockname()[1]
            address = f"/ip4/127.0.0.1/tcp/{entrance}/p2p/{answerer.peer_id}"
            with trio.fail_after(3):
                assert await asker.connect([address], 10) == answerer.peer_id
            assert n_dialed == 2
            nursery.cancel_scope.cancel()


async def carry(source: trio.SocketStream, target: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async for data in source:
            await target.send_all(data)


async def test_nobody_there_then_somebody() -> None:
    identity, port = new_identity(), free_port()
    async with host_on_loopback() as asker:
        address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{identity.peer_id}"
        with pytest.raises(UnreachableError):
            await asker.connect([address], 5)
        async with host_on_loopback(identity, port) as answerer:
            answerer.serve(ECHO, echo)
            assert await asker.connect([address], 5) == answerer.peer_id
            assert await ask(asker, answerer.peer_id, b"now") == b"now"


async def test_restarted_host_is_reached_again() -> None:
    identity, port = new_identity(), free_port()
    async with host_on_loopback() as asker:
        events: list[ConnectionEvent] = []
        closed = trio.Event()

        def note(event: ConnectionEvent) -> None:
            events.append(event)
            if event.kind == "closed":
                closed.set()

        asker.on_connection(note)
        for _ in range(2):
            closed = trio.Event()
            async with host_on_loopback(identity, port) as answerer:
                answerer.serve(ECHO, echo)
                await asker.connect(answerer.addresses(), 5)
                assert await ask(asker, answerer.peer_id, b"hello") == b"hello"
            with trio.fail_after(5):
                await closed.wait()
        assert [event.kind for event in events] == ["established", "closed"] * 2
        assert {event.direction for event in events} == {"outbound"}
        assert events[1].cause
        assert asker.connected() == []


async def test_port_in_use_is_said() -> None:
    async with host_on_loopback() as first:
        port = int(first.addresses()[0].split("/")[4])
        with pytest.raises(InputError, match=f"port {port} .* is not free"):
            async with host_on_loopback(port=port):
                pass


async def test_idle_connection_is_closed_and_a_wanted_one_kept() -> None:
    async with (
        open_host(new_identity(), listen_host="127.0.0.1", idle_timeout_s=0.5) as host,
        host_on_loopback() as stranger,
        host_on_loopback() as friend,
    ):
        host.keep_connections(lambda peer_id: peer_id == friend.peer_id)
        closed = trio.Event()
        events: list[ConnectionEvent] = []

        def note(event: ConnectionEvent) -> None:
            if event.kind == "closed":
                events.append(event)
                closed.set()

        host.on_connection(note)
        await host.connect(friend.addresses(), 5)
        await host.connect(stranger.addresses(), 5)
        with trio.fail_after(5):
            await closed.wait()
        assert [(event.peer_id, event.cause) for event in events] == [
            (stranger.peer_id, "idle for 0.5 s")
        ]
        assert host.connected() == [friend.peer_id]


async def test_the_pings_of_one_side_are_signs_of_life_on_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shardmesh.swarm.connections._HEAD_START", 1000)  # of who has dialed
    asked: list[Pulse] = []
    enough = trio.Event()
    ask = Pulse.ask

    async def ask_and_note(pulse: Pulse) -> None:
        await ask(pulse)
        asked.append(pulse)
        if len(asked) == 5:
            enough.set()

    monkeypatch.setattr(Pulse, "ask", ask_and_note)
    async with (
        open_host(new_identity(), listen_host="127.0.0.1", ping_interval_s=0.1) as dialer,
        open_host(new_identity(), listen_host="127.0.0.1", ping_interval_s=0.1) as dialed,
    ):
        await dialer.connect(dialed.addresses(), 5)
        with trio.fail_after(20):
            await enough.wait()
        assert len(set(asked)) == 1
        assert dialed.connected() == [dialer.peer_id]


async def test_several_connections_of_two_nodes_live_side_by_side() -> None:
    """Both dial at once after a partition; one that is closed would look like a lost node."""
    kinds: list[str] = []
    closed = trio.Event()

    def note(event: ConnectionEvent) -> None:
        kinds.append(event.kind)
        if event.kind == "closed":
            closed.set()

    async with (
        open_host(new_identity(), listen_host="127.0.0.1", ping_interval_s=0.1) as host,
        host_on_loopback() as friend,
    ):
        host.on_connection(note)
        target = parse_address(friend.addresses()[0])[0], ID.from_base58(friend.peer_id)
        swarm = cast(MeshSwarm, host.libp2p.get_network())
        for _ in range(CONNECTIONS_PER_NODE_MAX):
            await swarm.dial_first([target])
        with trio.move_on_after(0.5):  # a few pings over each
            await closed.wait()
        assert kinds == ["established"] * CONNECTIONS_PER_NODE_MAX


async def test_what_is_no_address() -> None:
    async with host_on_loopback() as host:
        for text in ("", "localhost:51820", "/ip4/127.0.0.1", "/ip4/1.2.3.4/tcp/5/p2p/12D3KooWx"):
            with pytest.raises(InputError):
                await host.connect([text], 5)


async def test_addresses_of_strangers_do_no_harm() -> None:
    async with host_on_loopback() as asker, host_on_loopback() as answerer:
        answerer.serve(ECHO, echo)
        nonsense = ["/ip4/not-an-address/tcp/1", "/ip4/10.0.0.1/tcp/99999"]
        asker.learn(answerer.peer_id, nonsense)
        with pytest.raises(UnreachableError):
            await ask(asker, answerer.peer_id, b"hello")
        asker.learn(answerer.peer_id, nonsense + answerer.addresses())
        assert await ask(asker, answerer.peer_id, b"dialed by itself") == b"dialed by itself"


async def test_an_address_of_another_machine_is_no_port_that_is_taken() -> None:
    with pytest.raises(InputError, match=r"192\.0\.2\.1 is no address of this machine"):
        await check_port(["192.0.2.1"], 0)
