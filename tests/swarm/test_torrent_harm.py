"""Harm done to downloads: rubbish, silence, torrents and hashes that are not the right ones."""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path

import libtorrent as lt
import pytest
import trio
from support.torrents import (
    MB,
    FileMesh,
    FileNode,
    Miser,
    Poisoner,
    fetch,
    is_right,
    leftovers,
    make_model,
    wait_until,
)

from shardmesh.errors import InputError, ShardmeshError
from shardmesh.shards.hashing import hash_file
from shardmesh.shards.publication import OpenPublication
from shardmesh.swarm.torrents.exchange import Source, ask_for_file, connect_with
from shardmesh.swarm.torrents.opening import open_torrents
from shardmesh.swarm.torrents.session import Torrent
from shardmesh.swarm.torrents.settings import session_settings
from shardmesh.wire.torrent_file import TorrentFile

pytestmark = pytest.mark.processes


async def added(node: FileNode, torrent: TorrentFile) -> Torrent:
    """The download of a file that a node has begun, once libtorrent has it."""
    torrents = node.files._torrents
    await wait_until(lambda: torrents.get(torrent.info_hash()) is not None, "it begins")
    there = torrents.get(torrent.info_hash())
    assert there is not None
    await wait_until(lambda: there._handle is not None, "it is added")
    return there


async def test_one_poisoner_among_five(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(tmp_path / "a", 16 * MB)
    for name in ("c", "d", "e"):
        (tmp_path / name).mkdir()
        os.link(tmp_path / "a" / "shard-0.gguf", tmp_path / name / "shard-0.gguf")
    torrent = hash_file(tmp_path / "a" / "shard-0.gguf").torrent
    poisoner = Poisoner(torrent, tmp_path / "poison")
    mesh = FileMesh(tmp_path)
    slow = {"upload_rate_bytes_per_s": 4 * MB}  # so that the download needs the poisoner's speed
    async with (
        mesh.node("a", **slow) as first,
        mesh.node("c", **slow),
        mesh.node("d", **slow),
        mesh.node("e", **slow),
        mesh.node("b") as node,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(partial(fetch, node, model))
        await added(node, torrent)
        # as if the host of the first node had said that it gives pieces there
        await node.host.connect(first.host.addresses(), 5)
        source = Source(first.host.peer_id, poisoner.port, None)
        connect_with(node.host, node.files._torrents, torrent.info_hash(), source)
        await wait_until(lambda: (node.folder / "shard-0.gguf").exists(), "it is complete")
        assert is_right(node.folder / "shard-0.gguf", model)
    assert poisoner.n_bytes_sent > 0, "the poisoner was never asked"
    assert "is dropped for what it sent" in caplog.text


@pytest.mark.parametrize("is_silent", [True, False])
async def test_a_source_that_gives_nothing_holds_nobody_up(tmp_path: Path, is_silent: bool) -> None:
    """One that says nothing at all, and one that has the file and never sends a piece."""
    model = make_model(tmp_path / "a", 4 * MB)
    torrent = hash_file(tmp_path / "a" / "shard-0.gguf").torrent
    mesh = FileMesh(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        miser = None if is_silent else Miser(torrent, tmp_path / "a")
        port = silent.getsockname()[1] if miser is None else miser.port
        async with mesh.node("b") as node, trio.open_nursery() as nursery:
            async with mesh.node("a", upload_rate_bytes_per_s=1):  # only to tell the torrent
                nursery.start_soon(partial(fetch, node, model))
                there = await added(node, torrent)
                node.files._torrents.connect(there, "127.0.0.1", port)
                if miser is not None:
                    await wait_until(lambda: miser.n_connections > 0, "it is asked")
            async with mesh.node("a"):
                await wait_until(lambda: (node.folder / "shard-0.gguf").exists(), "it is complete")
        assert is_right(tmp_path / "b" / "shard-0.gguf", model)


async def test_nothing_is_looked_for_outside_of_the_mesh() -> None:
    known = lt.default_settings()
    settings = session_settings(
        ["127.0.0.1"], 0, upload_rate_bytes_per_s=0, download_rate_bytes_per_s=0
    )
    assert settings.keys() <= known.keys()
    async with open_torrents(listen_hosts=["127.0.0.1"]) as torrents:
        applied = torrents._session.get_settings()
        assert not torrents._session.is_dht_running()
    for name in ("dht", "lsd", "upnp", "natpmp", "incoming_utp", "outgoing_utp"):
        assert applied[f"enable_{name}"] is False
    assert (applied["dht_bootstrap_nodes"], applied["webtorrent_stun_server"]) == ("", "")
    assert applied["ssrf_mitigation"] is True


async def test_another_torrent_than_asked_for(tmp_path: Path) -> None:
    make_model(tmp_path / "a", 1 * MB)
    make_model(tmp_path / "c", 1 * MB, seed=5)
    other = hash_file(tmp_path / "c" / "shard-0.gguf").torrent
    mesh = FileMesh(tmp_path)
    async with mesh.node("a") as liar, mesh.node("b") as node:
        (there,) = [t for t in liar.files._torrents.all() if t.file.name == "shard-0.gguf"]
        info_hash = there.file.info_hash()
        there.file = other
        await node.host.connect(liar.host.addresses(), 5)
        with pytest.raises(ShardmeshError) as caught:
            await ask_for_file(node.host, liar.host.peer_id, info_hash, wants_torrent=True, port=0)
        assert caught.value.code == "BAD_TORRENT"


async def test_a_publisher_whose_hashes_contradict_each_other(tmp_path: Path) -> None:
    """The info-hash leads to a file that is not the manifest's: it never gets its name."""
    model = make_model(tmp_path / "a", 1 * MB)
    other = make_model(tmp_path / "c", 1 * MB, seed=5)
    lie = OpenPublication(
        type(model.publication)(
            manifest=model.manifest,
            shard_info_hashes=other.publication.shard_info_hashes,
            tokenizer_info_hash=other.publication.tokenizer_info_hash,
            adapter_info_hashes=(),
        ),
        model.publisher,
        model.signed,
    )
    mesh = FileMesh(tmp_path)
    async with mesh.node("c"), mesh.node("b") as node:
        with pytest.raises(InputError) as caught:
            await fetch(node, lie)
        assert caught.value.code == "BAD_SHARD"
        assert not (node.folder / "shard-0.gguf").exists()
        assert leftovers(node.folder) == []
