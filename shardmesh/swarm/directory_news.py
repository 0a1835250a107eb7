"""Following a neighbour's directory: it tells what has changed in it, as soon as it has.

Listeners are told of changes anyway, by each other.  A client is nobody's listener; it keeps one
stream open instead of asking again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import trio

from shardmesh.errors import RefusedError, UnreachableError
from shardmesh.swarm.directory import Directory, take_in
from shardmesh.swarm.host import Host
from shardmesh.swarm.streams import ByteStream, receive_message, send_message
from shardmesh.wire.announcement import (
    DIRECTORY_NEWS_PROTOCOL,
    DirectoryFollow,
    DirectoryNews,
)
from shardmesh.wire.codec import decode_cbor, encode_cbor
from shardmesh.wire.limits import (
    DIRECTORY_NEWS_HEARTBEAT_S,
    DIRECTORY_NEWS_INTERVAL_S,
    DIRECTORY_NEWS_SILENCE_MAX_S,
    DIRECTORY_REQUEST_BYTES_MAX,
    DIRECTORY_RESPONSE_BYTES_MAX,
    REQUEST_READ_TIMEOUT_S,
)


def news_since(told: Mapping[str, bytes], now: Mapping[str, bytes]) -> DirectoryNews:
    """What makes `now` of `told`, both signed announcements by peer id.  Pure."""
    return DirectoryNews(
        announcements=tuple(signed for who, signed in now.items() if told.get(who) != signed),
        gone=tuple(sorted(told.keys() - now.keys())),
    )


def serve_directory_news(host: Host, directory: Directory) -> None:
    """Tells whoever opens a stream all that the directory knows, and then what changes.

    One stream for each node: each change is sent on every one.
    """
    followers: set[str] = set()

    async def serve(stream: ByteStream, peer_id: str) -> None:
        with trio.fail_after(REQUEST_READ_TIMEOUT_S):
            data = await receive_message(stream, DIRECTORY_REQUEST_BYTES_MAX)
        if decode_cbor(data, DirectoryFollow).cluster != directory.cluster:
            raise RefusedError("asked for news of another cluster", code="OTHER_CLUSTER")
        if peer_id in followers:
            raise RefusedError("asked for news that it is told already")
        followers.add(peer_id)
        try:
            await tell_news(stream, directory)
        finally:
            followers.discard(peer_id)

    host.serve(DIRECTORY_NEWS_PROTOCOL, serve, lasting=True)


async def tell_news(stream: ByteStream, directory: Directory) -> None:
    """Sends news whenever there are some, and a sign of life else, until the stream breaks.

    The next news are put together when the last ones are sent, so none wait for a slow reader.
    """
    told: dict[str, bytes] = {}
    while True:
        version, now = directory.version, directory.signed_by_node()
        await send_message(stream, encode_cbor(news_since(told, now)))
        told = now
        await trio.sleep(DIRECTORY_NEWS_INTERVAL_S)
        with trio.move_on_after(DIRECTORY_NEWS_HEARTBEAT_S):
            await directory.wait_changed(version)


async def follow_directory(
    host: Host, directory: Directory, peer_id: str, on_gone: Callable[[Sequence[str]], None]
) -> None:
    """Takes in what a neighbour's directory tells, until cancelled.

    `on_gone` is given the peer ids of live entries that the neighbour does not know, or no more.
    Raises UnreachableError (the moment's) when it has gone or is silent, RefusedError (theirs) if
    it does not speak the protocol, ProtocolError (theirs) for news that are none.
    """
    stream = await host.open_stream(peer_id, DIRECTORY_NEWS_PROTOCOL)
    try:
        await send_message(stream, encode_cbor(DirectoryFollow(cluster=directory.cluster)))
        await take_in_news(stream, directory, peer_id, on_gone)
    finally:
        stream.abort()


async def take_in_news(
    stream: ByteStream,
    directory: Directory,
    peer_id: str,
    on_gone: Callable[[Sequence[str]], None],
) -> None:
    """The reading side of `tell_news`; raises as `follow_directory` does."""
    is_first = True
    while True:
        with trio.move_on_after(DIRECTORY_NEWS_SILENCE_MAX_S) as silence:
            data = await receive_message(stream, DIRECTORY_RESPONSE_BYTES_MAX)
        if silence.cancelled_caught:
            raise UnreachableError(f"{peer_id} tells no news any more")
        news = decode_cbor(data, DirectoryNews)
        take_in(directory, news.announcements, peer_id)
        unknown = directory.live_but(news.announcements) if is_first else list(news.gone)
        is_first = False
        if gone := [each for each in unknown if directory.get(each) is not None]:
            on_gone(gone)
