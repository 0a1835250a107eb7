"""A private mesh's BitTorrent lets members in, as far as addresses can tell."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import trio
from support.torrents import MB, FileMesh, Stranger, make_model

from shardmesh.shards.hashing import hash_file
from shardmesh.swarm.identity import new_identity
from shardmesh.swarm.torrents.gate import Gate
from shardmesh.wire.cluster_secret import new_secret
from shardmesh.wire.limits import KNOWN_NODES_MAX, TORRENT_MEMBER_S

OTHER_HOST = "127.0.0.2"
DEADLINE_S = 60.0


def test_nobody_is_let_in_before_somebody_was_heard_of() -> None:
    assert Gate().hosts(0) == frozenset()


def test_a_member_is_let_in_for_a_while() -> None:
    gate = Gate()
    gate.note("a", ["10.0.0.1", "fd00::1"], 0)
    gate.note("b", ["10.0.0.2"], TORRENT_MEMBER_S / 2)
    assert gate.hosts(TORRENT_MEMBER_S / 2) == {"10.0.0.1", "fd00::1", "10.0.0.2"}
    assert gate.hosts(TORRENT_MEMBER_S) == {"10.0.0.2"}
    gate.note("b", ["10.0.0.3"], TORRENT_MEMBER_S)  # it has moved
    assert gate.hosts(TORRENT_MEMBER_S) == {"10.0.0.3"}
    gate.forget(["b", "unknown"])
    assert gate.hosts(TORRENT_MEMBER_S) == frozenset()


def test_members_may_share_an_address() -> None:
    gate = Gate()
    for peer_id in ("a", "b"):
        gate.note(peer_id, ["10.0.0.1"], 0)
    gate.forget(["a"])
    assert gate.hosts(1) == {"10.0.0.1"}


def test_a_member_behind_a_relay_opens_it_for_all() -> None:
    gate = Gate()
    gate.note("a", ["10.0.0.1"], 0)
    gate.note("b", [], 0)
    assert gate.hosts(1) is None
    gate.note("b", ["10.0.0.2"], 2)  # it is seen directly now
    assert gate.hosts(3) == {"10.0.0.1", "10.0.0.2"}


def test_it_remembers_so_many_and_no_more() -> None:
    gate = Gate()
    gate.note("first", ["10.0.0.1"], 0)
    for number in range(KNOWN_NODES_MAX):
        gate.note(f"node {number}", ["10.0.0.2"], 0)
    assert gate.hosts(1) == {"10.0.0.2"}


@pytest.fixture
def private(tmp_path: Path) -> FileMesh:
    return FileMesh(tmp_path, new_secret(new_identity().public_key))


def stranger(tmp_path: Path) -> Stranger:
    torrent = hash_file(tmp_path / "a" / "shard-0.gguf").torrent
    try:
        return Stranger(torrent, tmp_path / "stranger", OTHER_HOST)
    except OSError:
        pytest.skip("this machine has one loopback address only")


@pytest.mark.processes
async def test_members_exchange_files_and_a_stranger_gets_nothing(
    tmp_path: Path, private: FileMesh
) -> None:
    model = make_model(tmp_path / "a", 6 * MB)
    thief = stranger(tmp_path)
    async with (
        private.node("a", upload_rate_bytes_per_s=2 * MB) as source,
        private.node("b") as node,
    ):
        thief.dial(source.files._torrents.port)
        with trio.fail_after(DEADLINE_S):
            await node.files.fetch(model, model.publication.shard(0), node.folder)
            while not thief.n_failed:  # noqa: ASYNC110 - it tells nobody
                await trio.sleep(0.05)
        assert thief.n_bytes == 0


@pytest.mark.processes
async def test_in_a_public_mesh_everybody_gets_files(tmp_path: Path) -> None:
    make_model(tmp_path / "a", 1 * MB)
    guest = stranger(tmp_path)
    async with FileMesh(tmp_path).node("a") as source:
        guest.dial(source.files._torrents.port)
        with trio.fail_after(DEADLINE_S):
            while guest.n_bytes < 1 * MB:  # noqa: ASYNC110 - it tells nobody
                await trio.sleep(0.05)


@pytest.mark.processes
async def test_a_removed_member_gets_no_more(tmp_path: Path, private: FileMesh) -> None:
    model = make_model(tmp_path / "a", 20 * MB)
    async with (
        private.node("a", upload_rate_bytes_per_s=2 * MB) as source,
        private.node("b") as node,
    ):
        async with trio.open_nursery() as nursery:
            fetch = partial(node.files.fetch, model, model.publication.shard(0), node.folder)
            nursery.start_soon(fetch)
            with trio.fail_after(DEADLINE_S):
                while not source.files.seeding().n_connections:  # noqa: ASYNC110
                    await trio.sleep(0.05)
                await source.files.cut_off([node.host.peer_id])
                await source.host.disconnect(node.host.peer_id, "removed")
                source.host.admission.denied = frozenset([node.host.peer_id])
                while source.files.seeding().n_connections:  # noqa: ASYNC110
                    await trio.sleep(0.05)
            nursery.cancel_scope.cancel()
