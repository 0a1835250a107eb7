"""Asking other nodes for torrents, for pieces and for published models: /torrent/1.0."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import trio

from shardmesh.errors import ProtocolError
from shardmesh.swarm.host import Host
from shardmesh.swarm.streams import ByteStream, receive_message, send_message
from shardmesh.swarm.torrents.session import Endpoint, TorrentSession
from shardmesh.wire.codec import decode_cbor, encode_cbor
from shardmesh.wire.limits import (
    REQUEST_READ_TIMEOUT_S,
    TORRENT_REQUEST_BYTES_MAX,
    TORRENT_RESPONSE_BYTES_MAX,
)
from shardmesh.wire.torrent_file import TorrentFile, decode_torrent
from shardmesh.wire.torrent_messages import (
    TORRENT_PROTOCOL,
    FileRequest,
    FileResponse,
    ModelRequest,
    ModelResponse,
    TorrentRequest,
)

_ASK_TIMEOUT_S: Final = 5.0
_HOSTS_MAX: Final = 4


class FindPublication(Protocol):
    """Gives the signed manifest with a digest, None if this node has none."""

    def __call__(self, manifest_digest: str) -> Awaitable[bytes | None]: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """What a node said about a file: where it gives pieces, port 0 if it does not."""

    peer_id: str
    port: int
    torrent: TorrentFile | None


def serve_torrents(
    host: Host,
    torrents: TorrentSession,
    find_publication: FindPublication,
    learn: Callable[[str], None] = lambda peer_id: None,
) -> None:
    """Answers other nodes; who asks for a file that is here is also dialed, once it says where.

    `learn` makes the host know where a node says that it is, if it says so.
    """

    def answer_file(request: FileRequest, peer_id: str) -> FileResponse:
        _admit(host, torrents, peer_id)
        torrent = torrents.get(request.info_hash)
        if torrent is None or torrent.error is not None:
            return FileResponse(port=0, torrent=None)
        if host.is_relayed(peer_id):  # this node cannot be dialed, but perhaps that one can
            learn(peer_id)
        for address in _hosts(host, peer_id)[: _HOSTS_MAX if host.is_relayed(peer_id) else 1]:
            torrents.connect(torrent, address, request.port)
        encoded = torrent.file.encode() if request.wants_torrent else None
        return FileResponse(port=torrents.port, torrent=encoded)

    async def answer_model(request: ModelRequest) -> ModelResponse:
        return ModelResponse(publication=await find_publication(request.manifest_digest))

    async def serve(stream: ByteStream, peer_id: str) -> None:
        with trio.fail_after(REQUEST_READ_TIMEOUT_S):
            data = await receive_message(stream, TORRENT_REQUEST_BYTES_MAX)
        request: TorrentRequest = decode_cbor(data, TorrentRequest)  # type: ignore[arg-type]
        answer: FileResponse | ModelResponse
        if isinstance(request, FileRequest):
            answer = answer_file(request, peer_id)
        else:
            answer = await answer_model(request)
        await send_message(stream, encode_cbor(answer))

    host.serve(TORRENT_PROTOCOL, serve)


async def ask_for_file(
    host: Host, peer_id: str, info_hash: bytes, *, wants_torrent: bool, port: int
) -> Source:
    """What a node has of a file; a torrent that it hands over is the right one.

    Raises UnreachableError (the moment's), RefusedError (theirs), ProtocolError (theirs,
    BAD_TORRENT) for a torrent that is none or another one.
    """
    request = FileRequest(info_hash=info_hash, wants_torrent=wants_torrent, port=port)
    answer = decode_cbor(await _ask(host, peer_id, request), FileResponse)
    torrent = None
    if answer.torrent is not None and wants_torrent:
        torrent = await trio.to_thread.run_sync(decode_torrent, answer.torrent)
        if torrent.info_hash() != info_hash:
            raise ProtocolError("another torrent than asked for", code="BAD_TORRENT")
    return Source(peer_id, answer.port, torrent)


async def ask_for_model(host: Host, peer_id: str, manifest_digest: str) -> bytes | None:
    """The signed manifest that a node hands over, not looked at; raises as `ask_for_file`."""
    request = ModelRequest(manifest_digest=manifest_digest)
    return decode_cbor(await _ask(host, peer_id, request), ModelResponse).publication


def take_in(host: Host, torrents: TorrentSession, source: Source) -> list[Endpoint]:
    """Lets a source connect; where it gives pieces: at addresses that its node is known by."""
    if not source.port:
        return []
    _admit(host, torrents, source.peer_id)
    return [(address, source.port) for address in _hosts(host, source.peer_id)]


def connect_with(host: Host, torrents: TorrentSession, info_hash: bytes, source: Source) -> None:
    """Dials a source's BitTorrent."""
    torrent = torrents.get(info_hash)
    if torrent is not None:
        for address, port in take_in(host, torrents, source):
            torrents.connect(torrent, address, port)


def _admit(host: Host, torrents: TorrentSession, peer_id: str) -> None:
    """A member behind a relay connects from an address that nobody here knows."""
    torrents.admit(peer_id, [] if host.is_relayed(peer_id) else _hosts(host, peer_id))


def _hosts(host: Host, peer_id: str) -> list[str]:
    return host.hosts_of(peer_id)[:_HOSTS_MAX]


async def _ask(host: Host, peer_id: str, request: TorrentRequest) -> bytes:
    return await host.request(
        peer_id,
        TORRENT_PROTOCOL,
        encode_cbor(request),
        timeout_s=_ASK_TIMEOUT_S,
        response_bytes_max=TORRENT_RESPONSE_BYTES_MAX,
    )


Ask = Callable[[str], Awaitable[None]]
"""Asks one node and does something with its answer."""


async def ask_all(peer_ids: list[str], ask: Ask, *, n_at_once: int = 16) -> None:
    """Asks nodes, several at once; returns when all have answered or not."""
    limiter = trio.CapacityLimiter(n_at_once)

    async def ask_one(peer_id: str) -> None:
        async with limiter:
            await ask(peer_id)

    async with trio.open_nursery() as nursery:
        for peer_id in peer_ids:
            nursery.start_soon(ask_one, peer_id)
