"""One past each limit of what others may send, keep or take here."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest
import trio
from support.announcements import CLUSTER, an_announcement

import shardmesh.swarm.commands as commands_module
import shardmesh.swarm.host as host_module
import shardmesh.swarm.serving as serving_module
import shardmesh.swarm.transport as transport_module
from shardmesh.errors import ProtocolError, TheirError, UnreachableError
from shardmesh.swarm.commands import send_command, serve_commands
from shardmesh.swarm.directory import Directory, serve_directory, take_in
from shardmesh.swarm.host import Host, open_host
from shardmesh.swarm.identity import new_identity
from shardmesh.swarm.remembered import RememberedNodes
from shardmesh.swarm.streams import receive_message, send_message
from shardmesh.wire.announcement import (
    DIRECTORY_PROTOCOL,
    Announcement,
    DirectoryRequest,
    encode_signed,
    open_signed,
)
from shardmesh.wire.codec import decode_cbor, encode_cbor
from shardmesh.wire.commands import (
    JSON_PROTOCOL,
    decode_command,
    decode_response,
    encode_data,
)
from shardmesh.wire.limits import (
    ANNOUNCEMENT_ADDRESSES_MAX,
    ANNOUNCEMENT_BYTES_MAX,
    ANNOUNCEMENT_CLOCK_SKEW_MAX_S,
    ANNOUNCEMENT_LIFETIME_MAX_S,
    CHAT_MESSAGES_MAX,
    COMMAND_BYTES_MAX,
    COMMAND_RESPONSE_BYTES_MAX,
    DIRECTORY_PUSH_MAX,
    DIRECTORY_REQUEST_BYTES_MAX,
    REMEMBERED_FILE_BYTES_MAX,
)

IDENTITY = new_identity()


@contextlib.asynccontextmanager
async def hosts(n: int) -> AsyncIterator[Sequence[Host]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(open_host(new_identity(), listen_host="127.0.0.1"))
            for _ in range(n)
        ]


# -- announcements -----------------------------------------------------------------------------


def test_addresses_of_an_announcement() -> None:
    address = an_announcement(IDENTITY).addresses[0]
    most = an_announcement(IDENTITY, addresses=(address,) * ANNOUNCEMENT_ADDRESSES_MAX)
    assert open_signed(encode_signed(most, IDENTITY)) == most
    with pytest.raises(ProtocolError):
        encode_signed(msgspec.structs.replace(most, addresses=(*most.addresses, address)), IDENTITY)


def test_bytes_of_an_announcement() -> None:
    with pytest.raises(ProtocolError) as caught:
        open_signed(bytes(ANNOUNCEMENT_BYTES_MAX + 1))
    assert caught.value.code == "TOO_LARGE"


def test_lifetime_of_an_announcement() -> None:
    longest = an_announcement(IDENTITY)
    assert longest.expires_at_s - longest.issued_at_s == ANNOUNCEMENT_LIFETIME_MAX_S
    fields = {name: getattr(longest, name) for name in longest.__struct_fields__}
    with pytest.raises(ValueError, match="lifetime"):
        Announcement(**{**fields, "expires_at_s": longest.expires_at_s + 1})


def test_what_is_not_believed_is_counted_by_its_code() -> None:
    now_s = int(time.time())
    late = now_s + ANNOUNCEMENT_CLOCK_SKEW_MAX_S
    told = [
        encode_signed(an_announcement(IDENTITY, **changes), IDENTITY)
        for changes in (
            {"cluster": "other"},
            {"issued_at_s": now_s - 700, "expires_at_s": now_s - 100},
            {"issued_at_s": late + 100, "expires_at_s": late + 200},
        )
    ]
    good = bytearray(encode_signed(an_announcement(IDENTITY), IDENTITY))
    good[-1] ^= 1
    directory = Directory(CLUSTER)
    take_in(directory, [*told, bytes(good), b"", bytes(ANNOUNCEMENT_BYTES_MAX + 1)], "somebody")
    assert directory.all() == []
    expected = {"BAD_MESSAGE", "EXPIRED", "WRONG_CLOCK", "BAD_SIGNATURE", "BAD_CBOR", "TOO_LARGE"}
    assert set(directory.n_refused) == expected
    assert sum(directory.n_refused.values()) == 6


def test_announcements_in_one_request() -> None:
    one = bytes(10)
    most = DirectoryRequest(cluster=CLUSTER, push=(one,) * DIRECTORY_PUSH_MAX, pull=False)
    assert decode_cbor(encode_cbor(most), DirectoryRequest) == most
    more = msgspec.structs.replace(most, push=(*most.push, one))
    with pytest.raises(ProtocolError):
        decode_cbor(encode_cbor(more), DirectoryRequest)


async def test_a_request_to_a_directory_that_is_too_long() -> None:
    async with hosts(2) as (asker, answerer):
        serve_directory(answerer, Directory(CLUSTER))
        await asker.connect(answerer.addresses(), 5)
        stream = await asker.open_stream(answerer.peer_id, DIRECTORY_PROTOCOL)
        await stream.send_all((DIRECTORY_REQUEST_BYTES_MAX + 1).to_bytes(4, "big"))
        with pytest.raises((UnreachableError, ProtocolError)), trio.fail_after(5):
            await receive_message(stream, 100)


# -- commands ----------------------------------------------------------------------------------


def test_bytes_of_a_command() -> None:
    good = b'{"command": "GET_METRICS"}'
    decode_command(good + b" " * (COMMAND_BYTES_MAX - len(good)))
    with pytest.raises(ProtocolError) as caught:
        decode_command(good + b" " * (COMMAND_BYTES_MAX - len(good) + 1))
    assert caught.value.code == "TOO_LARGE"


def test_bytes_of_an_answer() -> None:
    around = len(encode_data(""))
    assert decode_response(encode_data("x" * (COMMAND_RESPONSE_BYTES_MAX - around)))
    with pytest.raises(ProtocolError) as caught:
        encode_data("x" * (COMMAND_RESPONSE_BYTES_MAX - around + 1))
    assert caught.value.code == "TOO_LARGE"


def test_messages_of_a_chat() -> None:
    def chat(n: int) -> bytes:
        messages = ",".join(['{"role": "user", "content": "x"}'] * n)
        return f'{{"command": "INFERENCE", "params": {{"messages": [{messages}]}}}}'.encode()

    decode_command(chat(CHAT_MESSAGES_MAX))
    with pytest.raises(ProtocolError):
        decode_command(chat(CHAT_MESSAGES_MAX + 1))


def test_a_command_nested_a_hundred_thousand_deep() -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_command(b'{"command": "GET_METRICS", "params": ' + b"[" * 100_000)
    assert caught.value.code == "BAD_JSON"


async def test_a_request_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands_module, "REQUEST_READ_TIMEOUT_S", 0.2)
    async with hosts(2) as (asker, answerer):
        serve_commands(answerer, {})
        await asker.connect(answerer.addresses(), 5)
        stream = await asker.open_stream(answerer.peer_id, JSON_PROTOCOL)
        await stream.send_all(b"\0\0\0\x10{")
        with trio.fail_after(5):
            answer = await receive_message(stream, 10_000)
        with pytest.raises(TheirError) as caught:
            decode_response(answer)
        assert caught.value.code == "TOO_SLOW"


# -- connections -------------------------------------------------------------------------------


async def test_requests_of_all_nodes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_module, "REQUESTS_MAX", 2)
    async with hosts(2) as (asker, answerer):
        held = trio.Event()

        async def hold(params: object) -> object:
            await held.wait()
            return {}

        serve_commands(answerer, {"GET_METRICS": hold})
        await asker.connect(answerer.addresses(), 5)
        codes: list[str] = []

        async def ask() -> None:
            try:
                await send_command(asker, answerer.peer_id, "GET_METRICS")
                codes.append("ok")
            except Exception as error:  # noqa: BLE001 - its code is looked at below
                codes.append(getattr(error, "code", repr(error)))
                held.set()

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(ask)
        assert sorted(codes) == ["BUSY", "ok", "ok"]


async def test_nodes_whose_addresses_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "KNOWN_NODES_MAX", 3)
    async with hosts(1) as (host,):
        for _ in range(5):
            host.learn(new_identity().peer_id, ["/ip4/127.0.0.1/tcp/1"])
        assert len(host.libp2p.get_peerstore().peer_ids()) == 3


async def test_addresses_that_are_dialed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "DIAL_ADDRESSES_MAX", 2)
    async with hosts(2) as (asker, answerer):
        dead = [f"/ip4/127.0.0.1/tcp/{port}" for port in (1, 2)]
        with pytest.raises(UnreachableError):
            await asker.connect([*dead, *answerer.addresses()], 5)
        assert await asker.connect([dead[0], *answerer.addresses()], 5) == answerer.peer_id


def test_a_file_of_remembered_nodes_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    path.write_bytes(b'{"nodes":[]}' + b" " * REMEMBERED_FILE_BYTES_MAX)
    assert RememberedNodes(path).nodes() == []


async def test_a_message_one_byte_past_its_limit_is_not_read() -> None:
    async def answer(stream: object, peer_id: str) -> None:
        await send_message(stream, await receive_message(stream, 8))  # type: ignore[arg-type]

    async with hosts(2) as (asker, answerer):
        answerer.serve("/test/1.0", answer)
        await asker.connect(answerer.addresses(), 5)

        async def ask(payload: bytes) -> bytes:
            return await asker.request(
                answerer.peer_id, "/test/1.0", payload, timeout_s=5, response_bytes_max=8
            )

        assert await ask(b"12345678") == b"12345678"
        with pytest.raises((UnreachableError, ProtocolError)):
            await ask(b"123456789")
