"""Model files between nodes: real sessions on loopback, files of tens of MB."""

from __future__ import annotations

import shutil
import socket
from functools import partial
from pathlib import Path

import psutil
import pytest
import trio
from support.torrents import (
    DEADLINE_S,
    MB,
    FileMesh,
    fetch,
    is_right,
    leftovers,
    make_model,
    wait_until,
)

from shardmesh.errors import InputError
from shardmesh.shards.partial import PartialFile
from shardmesh.swarm.addresses import default_hosts
from shardmesh.swarm.torrents import download as download_module
from shardmesh.swarm.torrents.opening import open_torrents
from shardmesh.swarm.torrents.progress import eta_s
from shardmesh.swarm.torrents.service import BUSY_RATE_BYTES_PER_S, backed_off
from shardmesh.swarm.torrents.sources import file_key

pytestmark = pytest.mark.processes

# -- what should happen ------------------------------------------------------------------------


async def test_a_file_comes_whole_and_is_given_on(tmp_path: Path) -> None:
    model = make_model(tmp_path / "a", 20 * MB)
    mesh = FileMesh(tmp_path)
    async with mesh.node("b") as second, mesh.node("c") as third:
        async with mesh.node("a"):
            path = await fetch(second, model)
        assert is_right(path, model)
        assert leftovers(second.folder) == []
        progress = second.files.downloads()[0]
        assert (progress.state, progress.n_bytes_done, progress.eta_s) == ("done", 20 * MB, 0.0)
        assert is_right(await fetch(third, model), model)  # the first node is gone
        await wait_until(lambda: third.files.files() != [], "it gives the file itself")
        assert [(f.name, f.sha256, f.share_complete) for f in third.files.files()] == [
            ("shard-0.gguf", model.manifest.shards[0].sha256, 1.0)
        ]


async def test_progress_is_seen_and_a_rate_is_kept(tmp_path: Path) -> None:
    model = make_model(tmp_path / "a", 6 * MB)
    mesh = FileMesh(tmp_path)
    states: set[str] = set()
    async with mesh.node("a", upload_rate_bytes_per_s=4 * MB), mesh.node("b") as node:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                while True:
                    for progress in node.files.downloads():
                        states.add(progress.state)
                        if progress.state == "downloading" and progress.rate_bytes_per_s:
                            assert progress.n_sources == 1
                            assert progress.eta_s is not None
                            assert 0 <= progress.n_bytes_done <= 6 * MB
                            states.add("has rate")
                    await trio.sleep(0.05)

            nursery.start_soon(watch)
            begun_s = trio.current_time()
            await fetch(node, model)
            nursery.cancel_scope.cancel()
        assert trio.current_time() - begun_s > 6 / 4 * 0.5  # libtorrent lets a burst pass
    assert {"downloading", "has rate"} <= states


async def test_who_fetches_gives_what_it_has_already(tmp_path: Path) -> None:
    """Two at once from a slow source: together they get more than it gives."""
    model = make_model(tmp_path / "a", 8 * MB)
    mesh = FileMesh(tmp_path)
    async with (
        mesh.node("a", upload_rate_bytes_per_s=4 * MB) as source,
        mesh.node("b") as second,
        mesh.node("c") as third,
    ):
        key = file_key(model.publication.shard(0).info_hash)
        for node in (second, third):  # as listeners of one directory know each other
            mesh.table.setdefault(key, {})[node.host.peer_id] = node.host.addresses()
        async with trio.open_nursery() as nursery:
            for node in (second, third):
                nursery.start_soon(fetch, node, model)
        assert is_right(second.folder / "shard-0.gguf", model)
        assert is_right(third.folder / "shard-0.gguf", model)
        assert source.n_bytes_given < 1.9 * 8 * MB


async def test_all_models_are_given(tmp_path: Path) -> None:
    mesh = FileMesh(tmp_path)
    models = tmp_path / "models"
    flat = make_model(tmp_path / "a", 300_000)
    other = make_model(models / "other", 400_000, name="other", seed=1)
    (models / "notes").mkdir()
    (models / "notes" / "some model.gguf").write_bytes(b"x" * 1000)
    async with mesh.node("a") as node:
        node.files._library.models_dir = models
        node.files.look_now()
        await wait_until(lambda: node.files.seeding().n_files == 5, "all five are given")
        for model in (flat, other):
            found = await node.files.find_publication(model.manifest.digest())
            assert found is not None
            assert found.signed == model.signed
        (models / "notes" / "some model.gguf").unlink()
        node.files.look_now()
        await wait_until(lambda: node.files.seeding().n_files == 4, "one less")


async def test_a_file_of_two_models_is_given_as_long_as_one_has_it(tmp_path: Path) -> None:
    """As the tokenizer of a model that was cut in two ways."""
    mesh = FileMesh(tmp_path)
    model = make_model(tmp_path / "a", 300_000)
    (tmp_path / "models").mkdir()
    async with mesh.node("a") as node, mesh.node("b") as taker:
        (tmp_path / "models" / "again").mkdir()
        copy = shutil.copy(node.folder / "shard-0.gguf", tmp_path / "models" / "again")
        node.files._library.models_dir = tmp_path / "models"
        node.files.look_now()
        await wait_until(lambda: node.files.seeding().n_files == 3, "the copy is found")
        (node.folder / "shard-0.gguf").unlink()
        node.files.look_now()
        await wait_until(
            lambda: (
                node.files.seeding().n_files == 2
                and copy in (str(path) for path, _ in node.files._seeder.all())
            ),
            "the copy is given",
        )
        assert is_right(await fetch(taker, model), model)


async def test_a_disk_that_was_gone_for_a_moment(tmp_path: Path) -> None:
    """The file is as it was, but libtorrent could not read it meanwhile."""
    mesh = FileMesh(tmp_path)
    model = make_model(tmp_path / "a", 300_000)
    path = tmp_path / "a" / "shard-0.gguf"
    async with mesh.node("a") as node, mesh.node("b") as taker, trio.open_nursery() as nursery:
        (torrent,) = (t for t in node.files._torrents.all() if t.file.name == path.name)
        path.rename(tmp_path / "gone")
        nursery.start_soon(fetch, taker, model)
        await wait_until(lambda: torrent.error is not None, "the file was missed")
        (tmp_path / "gone").rename(path)
        node.files.look_now()
        assert is_right(await fetch(taker, model), model)


# -- broken off, damaged, in the way -----------------------------------------------------------


async def test_it_goes_on_where_it_was_broken_off(tmp_path: Path) -> None:
    model = make_model(tmp_path / "a", 12 * MB)
    mesh = FileMesh(tmp_path)
    async with mesh.node("a", upload_rate_bytes_per_s=8 * MB) as source:
        async with mesh.node("b") as node, trio.open_nursery() as nursery:
            nursery.start_soon(partial(fetch, node, model))
            await wait_until(
                lambda: any(d.n_bytes_done > 4 * MB for d in node.files.downloads()), "a part"
            )
            nursery.cancel_scope.cancel()
        assert not (tmp_path / "b" / "shard-0.gguf").exists()
        async with mesh.node("b") as node:
            assert is_right(await fetch(node, model), model)
        assert source.n_bytes_given < 14 * MB  # what was under way is lost


async def test_only_the_damaged_piece_comes_again(tmp_path: Path) -> None:
    model = make_model(tmp_path / "a", 24 * MB)
    mesh = FileMesh(tmp_path)
    async with mesh.node("a") as source, mesh.node("b") as node:
        path = await fetch(node, model)
        n_before = source.n_bytes_given
        data = bytearray(path.read_bytes())
        data[10 * MB] ^= 1
        path.write_bytes(data)
        await fetch(node, model)
        assert is_right(path, model)
        assert source.n_bytes_given - n_before < 2 * MB
        assert leftovers(node.folder) == []


async def test_a_file_under_the_final_name_that_is_another_one_is_set_aside(
    tmp_path: Path,
) -> None:
    model = make_model(tmp_path / "a", 1 * MB)
    mesh = FileMesh(tmp_path)
    async with mesh.node("a"), mesh.node("b") as node:
        (node.folder / "shard-0.gguf").write_bytes(b"mine")
        path = await fetch(node, model)
        assert is_right(path, model)
        assert (node.folder / "shard-0.gguf.set-aside").read_bytes() == b"mine"


@pytest.mark.parametrize("comes_right", [True, False])
async def test_a_file_that_appears_meanwhile(tmp_path: Path, comes_right: bool) -> None:
    model = make_model(tmp_path / "a", 4 * MB)
    whole = (tmp_path / "a" / "shard-0.gguf").read_bytes()
    mesh = FileMesh(tmp_path)
    async with mesh.node("a", upload_rate_bytes_per_s=4 * MB), mesh.node("b", gives=False) as node:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(fetch, node, model))
            await wait_until(
                lambda: any(d.n_bytes_done > 0.5 * MB for d in node.files.downloads()), "it begins"
            )
            (node.folder / "shard-0.gguf").write_bytes(whole if comes_right else whole[::-1])
        assert is_right(node.folder / "shard-0.gguf", model)


@pytest.mark.parametrize("is_asked_for", [True, False])
async def test_what_was_begun_goes_when_the_file_came_another_way(
    tmp_path: Path, is_asked_for: bool
) -> None:
    model = make_model(tmp_path / "a", 4 * MB)
    mesh = FileMesh(tmp_path)
    async with mesh.node("a", upload_rate_bytes_per_s=4 * MB):
        async with mesh.node("b", gives=False) as node, trio.open_nursery() as nursery:
            nursery.start_soon(partial(fetch, node, model))
            await wait_until(
                lambda: any(d.n_bytes_done > 0.5 * MB for d in node.files.downloads()), "a part"
            )
            nursery.cancel_scope.cancel()
    assert leftovers(tmp_path / "b") != []
    (tmp_path / "b" / "shard-0.gguf").write_bytes((tmp_path / "a" / "shard-0.gguf").read_bytes())
    async with mesh.node("b", gives=not is_asked_for) as node:
        if is_asked_for:
            await fetch(node, model)
        assert leftovers(node.folder) == []


async def test_two_downloads_of_one_file_at_once_are_one(tmp_path: Path) -> None:
    model = make_model(tmp_path / "a", 8 * MB)
    mesh = FileMesh(tmp_path)
    async with mesh.node("a") as source, mesh.node("b") as node, mesh.node("b") as process:
        # `process` stands for another process of the same machine that uses the same folder
        async with trio.open_nursery() as nursery:
            for asking in (node, node, process):
                nursery.start_soon(partial(fetch, asking, model))
        assert is_right(node.folder / "shard-0.gguf", model)
        assert len(node.files.downloads()) == 1
        assert source.n_bytes_given < 9 * MB
        assert leftovers(node.folder) == []


async def test_nobody_has_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(tmp_path / "a", 1 * MB)
    mesh = FileMesh(tmp_path)
    async with mesh.node("b") as node, trio.open_nursery() as nursery:
        nursery.start_soon(partial(fetch, node, model))
        await wait_until(lambda: "No node has shard-0.gguf of random" in caplog.text, "it says so")
        assert node.files.downloads()[0].state == "looking"
        async with mesh.node("a"):
            await wait_until(lambda: (node.folder / "shard-0.gguf").exists(), "it comes")


# -- addresses, ports and rates ----------------------------------------------------------------


async def test_the_port_that_is_told_is_that_of_all_addresses() -> None:
    """Left to itself, libtorrent chooses another one for each."""
    own = [a for addresses in psutil.net_if_addrs().values() for a in addresses]
    async with open_torrents(listen_hosts=["0.0.0.0"]) as torrents:
        for address in own:
            if address.family == socket.AF_INET:
                with trio.fail_after(DEADLINE_S):
                    stream = await trio.open_tcp_stream(address.address, torrents.port)
                    await stream.aclose()


@pytest.mark.skipif(len(default_hosts()) < 2, reason="this machine has no IPv6")
async def test_files_are_given_over_ipv6_too(tmp_path: Path) -> None:
    """Many homes share their IPv4 address, and have an IPv6 one of their own."""
    mesh = FileMesh(tmp_path, hosts=("127.0.0.1", "::1"))
    model = make_model(tmp_path / "a", 300_000)
    async with mesh.node("a"), mesh.node("b") as taker:
        assert is_right(await fetch(taker, model), model)


async def test_an_address_of_another_machine() -> None:
    with pytest.raises(InputError) as caught:
        async with open_torrents(listen_hosts=["192.0.2.1"]):
            raise AssertionError("never")
    assert caught.value.code == "PORT_TAKEN"


async def test_what_was_fetched_is_checked_once_more_when_the_disk_has_spoiled_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "a", 4 * MB)
    spoiled: list[Path] = []
    real = PartialFile.is_right

    def spoil_first(partial_file: PartialFile) -> bool:
        if not spoiled:
            spoiled.append(partial_file.path)
            with partial_file.path.open("r+b") as file:
                file.seek(2 * MB)
                file.write(b"spoiled")
        return real(partial_file)

    monkeypatch.setattr(download_module.PartialFile, "is_right", spoil_first)
    mesh = FileMesh(tmp_path)
    async with mesh.node("a"), mesh.node("b") as node:
        assert is_right(await fetch(node, model), model)
    assert spoiled


async def test_giving_backs_off_while_the_node_computes(tmp_path: Path) -> None:
    model = make_model(tmp_path / "a", 12 * MB)
    mesh = FileMesh(tmp_path)
    async with mesh.node("a") as source, mesh.node("b") as node:
        source.files.back_off(True)
        await source.files.wait_given()
        assert source.files.seeding().is_backing_off
        begun_s = trio.current_time()
        await fetch(node, model)
        assert trio.current_time() - begun_s > 12 * MB / BUSY_RATE_BYTES_PER_S * 0.5
        source.files.back_off(False)
        assert not source.files.seeding().is_backing_off


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(0, BUSY_RATE_BYTES_PER_S), (1000, 1000), (10**9, BUSY_RATE_BYTES_PER_S)],
)
def test_the_rate_while_the_node_computes(rate: int, expected: int) -> None:
    assert backed_off(rate) == expected


@pytest.mark.parametrize(
    ("n_left", "rate", "expected"), [(0, 0, 0.0), (10, 0, None), (10, 5, 2.0), (-1, 5, 0.0)]
)
def test_the_remaining_time(n_left: int, rate: int, expected: float | None) -> None:
    assert eta_s(n_left, rate) == expected
