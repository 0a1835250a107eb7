"""One past each limit of what runs: templates, connections, requests, relays."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support.models import BUILT_IN
from support.torrents import FileMesh, make_model
from support.vocabularies import write_vocabulary

import shardmesh.swarm.dht as dht
import shardmesh.swarm.relay as relay_module
import shardmesh.swarm.torrents.exchange as exchange_module
import shardmesh.swarm.transport as transport_module
from shardmesh.engine import chat, grammar
from shardmesh.engine.chat import ChatTemplate
from shardmesh.engine.tokenizer import Tokenizer, _grow_until_it_fits
from shardmesh.errors import (
    EngineError,
    InputError,
    ProtocolError,
    ShardmeshError,
    UnreachableError,
)
from shardmesh.listener.commands import NodeCommands
from shardmesh.swarm.addresses import circuit_addresses
from shardmesh.swarm.directory import Directory, exchange
from shardmesh.swarm.host import Host, open_host
from shardmesh.swarm.identity import new_identity
from shardmesh.swarm.relay import Relay
from shardmesh.swarm.serving import Places
from shardmesh.swarm.streams import ByteStream, receive_message, send_message
from shardmesh.swarm.torrents import seeding
from shardmesh.swarm.torrents.exchange import _ask
from shardmesh.web import server
from shardmesh.web.guard import Guard, GuardSettings
from shardmesh.web.tokens import ApiTokens
from shardmesh.wire.announcement import DIRECTORY_PROTOCOL
from shardmesh.wire.codec import encode_cbor
from shardmesh.wire.commands import InferenceParams
from shardmesh.wire.limits import (
    CHAT_PROCESS_BYTES_MAX,
    CHAT_RENDERED_CHARS_MAX,
    CHAT_TEMPLATE_CHARS_MAX,
    CONNECTIONS_PER_NODE_MAX,
    DECODED_TOKENS_MAX,
    DHT_OPERATION_TIMEOUT_S,
    DIRECTORY_RESPONSE_BYTES_MAX,
    HTTP_BODY_TIMEOUT_S,
    HTTP_HEADER_BYTES_MAX,
    INFERENCE_TIMEOUT_S,
    KIB,
    LASTING_STREAMS_MAX,
    RELAY_MESSAGE_BYTES_MAX,
    REQUESTS_PER_NODE_MAX,
    TOKEN_PIECE_BYTES_MAX,
    TORRENT_REQUEST_BYTES_MAX,
    TORRENT_RESPONSE_BYTES_MAX,
    TORRENT_SEEDED_FILES_MAX,
    WEBSOCKET_MESSAGE_BYTES_MAX,
)
from shardmesh.wire.torrent_messages import TORRENT_PROTOCOL, ModelRequest


@asynccontextmanager
async def hosts(n: int) -> AsyncIterator[list[Host]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(open_host(new_identity(), listen_host="127.0.0.1"))
            for _ in range(n)
        ]


# -- texts and templates -----------------------------------------------------------------------


@pytest.fixture
def vocabulary(tmp_path: Path) -> Iterator[Tokenizer]:
    with Tokenizer.open(write_vocabulary(tmp_path / "v.gguf", BUILT_IN, "{{ '' }}")) as tokenizer:
        yield tokenizer


def _template(tmp_path: Path, template: str) -> ChatTemplate:
    return ChatTemplate(Tokenizer.open(write_vocabulary(tmp_path / "t.gguf", BUILT_IN, template)))


def test_tokens_decoded_at_once(vocabulary: Tokenizer) -> None:
    with pytest.raises(InputError, match=str(DECODED_TOKENS_MAX)):
        vocabulary.decode([0] * (DECODED_TOKENS_MAX + 1))


def test_a_token_of_impossible_length() -> None:
    """llama.cpp says that it needs so many bytes, and one more than may be."""
    sizes: list[int] = []

    def fill(buffer: Any, size: int) -> int:
        sizes.append(size)
        return -n_needed if size < n_needed else size

    n_needed = TOKEN_PIECE_BYTES_MAX
    assert len(_grow_until_it_fits(fill, 8, TOKEN_PIECE_BYTES_MAX)) == n_needed
    n_needed += 1
    sizes.clear()
    with pytest.raises(EngineError):
        _grow_until_it_fits(fill, 8, TOKEN_PIECE_BYTES_MAX)
    assert sizes == [8]


def test_a_template_and_what_it_renders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=str(CHAT_TEMPLATE_CHARS_MAX)):
        _template(tmp_path, "x" * (CHAT_TEMPLATE_CHARS_MAX + 1))
    for n_chars in (CHAT_RENDERED_CHARS_MAX, CHAT_RENDERED_CHARS_MAX + 1):
        template = _template(tmp_path, "{{ 'x' * " + str(n_chars) + " }}")
        with closing(template):
            if n_chars == CHAT_RENDERED_CHARS_MAX:
                assert len(template.render([])) == n_chars
            else:
                with pytest.raises(InputError, match=str(CHAT_RENDERED_CHARS_MAX)):
                    template.render([])


def test_the_memory_of_a_template(tmp_path: Path) -> None:
    template = _template(tmp_path, "{{ 'x' * " + str(CHAT_PROCESS_BYTES_MAX) + " }}")
    with closing(template), pytest.raises(InputError, match=r"memory|too much"):
        template.render([])


def test_an_answer_of_the_template_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is read no further than that, and half a line is no answer."""
    monkeypatch.setattr(chat, "CHAT_ANSWER_CHARS_MAX", 100)
    with closing(_template(tmp_path, "{{ 'x' * 200 }}")) as template:
        with pytest.raises(InputError, match="too much"):
            template.render([])


def test_a_schema_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "GRAMMAR_WORK_TIMEOUT_S", 0.01)
    with pytest.raises(InputError, match="too long"):
        grammar.grammar_of_json_schema('{"type": "number", "description": "not asked before"}')


# -- the gateway's sockets ---------------------------------------------------------------------


async def _app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        message = await receive()
        while message["type"] != "websocket.disconnect":
            message = await receive()
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"good"})


@asynccontextmanager
async def _served() -> AsyncIterator[int]:
    bound = server.bind_sockets("127.0.0.1", [0])[0]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_app, _app, [bound])
        yield bound.getsockname()[1]
        nursery.cancel_scope.cancel()


async def _answer(port: int, request: bytes) -> bytes:
    with trio.fail_after(10):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            try:
                await stream.send_all(request)
                return await stream.receive_some(100_000)
            except trio.BrokenResourceError:
                return b""


async def test_the_headers_of_a_request() -> None:
    async with _served() as port:
        for n_bytes, is_good in ((1000, True), (HTTP_HEADER_BYTES_MAX + 64 * KIB, False)):
            head = b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * n_bytes + b"\r\n\r\n"
            assert (b" 200 " in await _answer(port, head)) is is_good


async def test_connections_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HTTP_CONNECTIONS_MAX", 1)
    async with _served() as port:
        async with await trio.open_tcp_stream("127.0.0.1", port) as first:
            request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
            await first.send_all(request)
            assert b"200" in await first.receive_some(1000)
            assert await _answer(port, request) == b""
        with trio.fail_after(10):
            while b"200" not in await _answer(port, request):
                pass


async def test_a_connection_that_says_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HTTP_KEEP_ALIVE_S", 0.2)
    async with _served() as port:
        with trio.fail_after(10):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                while await stream.receive_some(1000):
                    pass


async def test_a_message_of_a_page() -> None:
    from wsproto import ConnectionType, WSConnection
    from wsproto.events import CloseConnection, Request, TextMessage

    async with _served() as port:
        with trio.fail_after(10):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                page = WSConnection(ConnectionType.CLIENT)
                await stream.send_all(page.send(Request(host="x", target="/")))
                page.receive_data(await stream.receive_some(10_000))
                list(page.events())
                await stream.send_all(
                    page.send(TextMessage(data="x" * (WEBSOCKET_MESSAGE_BYTES_MAX + 1)))
                )
                seen: list[type] = []
                while CloseConnection not in seen:
                    page.receive_data(await stream.receive_some(10_000))
                    seen += [type(event) for event in page.events()]


async def test_a_body_that_does_not_come(autojump_clock: trio.testing.MockClock) -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent.append(scope)

    async def never() -> Any:
        await trio.sleep_forever()

    async def send(message: Any) -> None:
        sent.append(message)

    guard = Guard(app, GuardSettings(tokens=ApiTokens()), {})
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/x", "headers": headers}
    started_s = trio.current_time()
    await guard({**scope, "query_string": b"", "client": ("127.0.0.1", 1)}, never, send)
    assert trio.current_time() - started_s == pytest.approx(HTTP_BODY_TIMEOUT_S)
    assert [message.get("status") for message in sent] == [408, None]


# -- libp2p ------------------------------------------------------------------------------------


def test_lasting_streams_have_places_of_their_own() -> None:
    places = Places(LASTING_STREAMS_MAX)
    for number in range(LASTING_STREAMS_MAX):
        assert places.take(f"node {number // REQUESTS_PER_NODE_MAX}")
    assert not places.take("one more")
    places.give_back("node 0")
    assert places.take("one more")


async def test_a_protocol_that_is_not_agreed_on_in_time() -> None:
    async with hosts(2) as (asker, answerer):
        await asker.connect(answerer.addresses(), 5)
        with pytest.raises(UnreachableError):
            await asker.open_stream(answerer.peer_id, "/nothing/1.0", timeout_s=0.0)


async def test_a_message_to_a_relay_that_is_too_long() -> None:
    async with hosts(2) as (relay, caller):
        Relay(relay).serve()
        await caller.connect(relay.addresses(), 5)
        with pytest.raises(ShardmeshError):
            await caller.request(
                relay.peer_id,
                relay_module.RELAY_PROTOCOL,
                bytes(RELAY_MESSAGE_BYTES_MAX + 1),
                timeout_s=5,
                response_bytes_max=100,
            )


async def test_connections_that_a_relay_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "RELAY_CIRCUITS_MAX", 0)
    async with hosts(3) as (relay, hidden, caller):
        Relay(relay).serve()
        await hidden.connect(relay.addresses(), 5)
        given = await relay_module.reserve(hidden, relay.peer_id)
        hidden.hide()
        circuits = circuit_addresses(relay.peer_id, relay.addresses(), given.addresses)
        hidden.come_through({relay.peer_id}, circuits)
        with pytest.raises(UnreachableError, match="as many"):
            await caller.connect(hidden.addresses(), 5)


async def test_a_question_about_a_torrent_that_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = encode_cbor(ModelRequest(manifest_digest="0" * 64))
    assert len(question) < TORRENT_REQUEST_BYTES_MAX
    async with FileMesh(tmp_path).node("a") as node, hosts(1) as (asker,):
        await asker.connect(node.host.addresses(), 5)
        assert await _ask(asker, node.host.peer_id, ModelRequest(manifest_digest="0" * 64))
        monkeypatch.setattr(exchange_module, "TORRENT_REQUEST_BYTES_MAX", len(question) - 1)
        with pytest.raises(ShardmeshError):
            await _ask(asker, node.host.peer_id, ModelRequest(manifest_digest="0" * 64))


async def test_files_beyond_the_last_are_not_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seeding, "TORRENT_SEEDED_FILES_MAX", 2)
    make_model(tmp_path / "a", 1000, 1000)  # two shards and a tokenizer
    async with FileMesh(tmp_path).node("a") as node:
        assert node.files.seeding().n_files == 2 < TORRENT_SEEDED_FILES_MAX


async def test_an_operation_of_the_dht(monkeypatch: pytest.MonkeyPatch) -> None:
    assert DHT_OPERATION_TIMEOUT_S > 1
    monkeypatch.setattr(dht, "DHT_OPERATION_TIMEOUT_S", 0.0)
    with pytest.raises(UnreachableError, match="too long"):
        with dht._deadline("looking"):
            await trio.sleep_forever()


async def test_a_directory_that_is_too_long() -> None:
    async def serve(stream: ByteStream, peer_id: str) -> None:
        await receive_message(stream, 10_000)
        await send_message(stream, bytes(DIRECTORY_RESPONSE_BYTES_MAX + 1))

    async with hosts(2) as (asker, answerer):
        answerer.serve(DIRECTORY_PROTOCOL, serve)
        await asker.connect(answerer.addresses(), 5)
        with pytest.raises(ProtocolError):
            await exchange(asker, Directory("c"), answerer.peer_id)


async def test_an_answer_to_inference_that_takes_too_long(
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Endless:
        """A coordinator whose chain never gives a token."""

        @asynccontextmanager
        async def complete(self, request: object) -> AsyncIterator[Any]:
            await trio.sleep_forever()
            yield None

    commands = NodeCommands(None, None, Endless())  # type: ignore[arg-type]
    started_s = trio.current_time()
    with pytest.raises(UnreachableError, match="took more than"):
        await commands._inference(InferenceParams(prompt="x"))
    assert trio.current_time() - started_s == pytest.approx(INFERENCE_TIMEOUT_S)


async def test_an_answer_about_a_torrent_that_is_too_long() -> None:
    async def serve(stream: ByteStream, peer_id: str) -> None:
        await receive_message(stream, 10_000)
        await send_message(stream, bytes(TORRENT_RESPONSE_BYTES_MAX + 1))

    async with hosts(2) as (asker, answerer):
        answerer.serve(TORRENT_PROTOCOL, serve)
        await asker.connect(answerer.addresses(), 5)
        with pytest.raises(ProtocolError):
            await _ask(asker, answerer.peer_id, ModelRequest(manifest_digest="0" * 64))


async def test_connections_with_one_node() -> None:
    identity = new_identity()
    async with hosts(1) as (answerer,):
        async with AsyncExitStack() as stack:
            for _ in range(CONNECTIONS_PER_NODE_MAX + 2):
                twin = await stack.enter_async_context(open_host(identity, listen_host="127.0.0.1"))
                try:
                    await twin.connect(answerer.addresses(), 5)
                except ShardmeshError:
                    continue
            swarm = answerer.libp2p.get_network()
            with trio.fail_after(10):
                while len(swarm.get_connections()) > CONNECTIONS_PER_NODE_MAX:
                    await trio.lowlevel.checkpoint()


async def test_connections_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "CONNECTIONS_MAX", 2)
    async with hosts(1) as (answerer,):
        monkeypatch.undo()
        async with hosts(4) as callers:
            for caller in callers:
                try:
                    await caller.connect(answerer.addresses(), 5)
                except ShardmeshError:
                    continue
            assert len(answerer.connected()) <= 2
