"""Adding and leaving torrents that are broken off half-way, with libtorrent itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio
from support.torrents import DEADLINE_S, FileMesh, make_model, wait_until

from shardmesh.errors import BusyError
from shardmesh.shards.hashing import hash_file
from shardmesh.swarm.torrents.opening import open_torrents
from shardmesh.swarm.torrents.session import TorrentSession
from shardmesh.wire.torrent_file import TorrentFile

pytestmark = pytest.mark.processes


@pytest.fixture
def torrent(tmp_path: Path) -> TorrentFile:
    make_model(tmp_path, 1_000_000)
    return hash_file(tmp_path / "shard-0.gguf").torrent


@pytest.fixture
async def session() -> AsyncIterator[TorrentSession]:
    async with open_torrents(listen_hosts=["127.0.0.1"]) as torrents:
        yield torrents


def n_inside(session: TorrentSession) -> int:
    """Torrents that libtorrent has."""
    return len(session._session.get_torrents())


async def test_an_adding_that_was_broken_off_can_be_removed(
    session: TorrentSession, torrent: TorrentFile, tmp_path: Path
) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await session.add(torrent, tmp_path / "b", is_whole=False)
    await session.remove(torrent.info_hash())
    assert session.get(torrent.info_hash()) is None
    assert n_inside(session) == 0
    with trio.fail_after(DEADLINE_S):
        await session.add(torrent, tmp_path, is_whole=True)
    assert n_inside(session) == 1


async def test_a_removal_that_was_broken_off_goes_on(
    session: TorrentSession, torrent: TorrentFile, tmp_path: Path
) -> None:
    await session.add(torrent, tmp_path / "b", is_whole=False)
    with trio.CancelScope() as scope:
        scope.cancel()
        await session.remove(torrent.info_hash())
    await wait_until(lambda: session.get(torrent.info_hash()) is None, "it leaves")
    assert n_inside(session) == 0


async def test_what_is_leaving_can_be_added_at_once(
    session: TorrentSession, torrent: TorrentFile, tmp_path: Path
) -> None:
    await session.add(torrent, tmp_path / "b", is_whole=False)
    with trio.CancelScope() as scope:
        scope.cancel()
        await session.remove(torrent.info_hash())
    with trio.fail_after(DEADLINE_S):
        again = await session.add(torrent, tmp_path, is_whole=True)
    assert session.get(torrent.info_hash()) is again
    assert n_inside(session) == 1


async def test_two_may_remove_it_at_once(
    session: TorrentSession, torrent: TorrentFile, tmp_path: Path
) -> None:
    await session.add(torrent, tmp_path / "b", is_whole=False)
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(session.remove, torrent.info_hash())
    assert session.get(torrent.info_hash()) is None
    assert n_inside(session) == 0


async def test_a_removal_while_the_whole_node_is_cancelled(
    torrent: TorrentFile, tmp_path: Path
) -> None:
    """As a download does it, which must leave nothing behind."""
    n_left = -1
    with trio.CancelScope() as scope:
        async with open_torrents(listen_hosts=["127.0.0.1"]) as session:
            await session.add(torrent, tmp_path / "b", is_whole=False)
            try:
                scope.cancel()
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True), trio.fail_after(10):
                    await session.remove(torrent.info_hash())
                    n_left = n_inside(session)
    assert n_left == 0


async def fail_while_cancelled(opened: AbstractAsyncContextManager[object]) -> None:
    with trio.CancelScope() as scope:
        async with opened:
            scope.cancel()
            raise BusyError("no room")


async def test_an_error_is_not_lost_while_everything_is_cancelled(tmp_path: Path) -> None:
    with pytest.raises(BusyError):
        await fail_while_cancelled(FileMesh(tmp_path).node("a"))
