"""Room for model files: a disk that is full, or becomes so, with real sessions on loopback."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

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

from shardmesh.errors import InputError, ShardmeshError
from shardmesh.listener.published import fetch_files

pytestmark = pytest.mark.processes


async def test_no_room_before_anything_is_fetched(tmp_path: Path) -> None:
    model = make_model(tmp_path / "a", 3 * MB)
    mesh = FileMesh(tmp_path)
    async with mesh.node("a"), mesh.node("b", max_disk_bytes=2 * MB) as node:
        with pytest.raises(InputError) as caught:
            await fetch(node, model)
        assert caught.value.code == "NO_ROOM"
        assert leftovers(node.folder) == []


async def test_no_room_for_all_files_is_said_before_the_first_byte(tmp_path: Path) -> None:
    """Each of them would find room."""
    model = make_model(tmp_path / "a", 2 * MB, 2 * MB, 2 * MB, n_bytes_tokenizer=1000)
    mesh = FileMesh(tmp_path)
    async with mesh.node("a") as source, mesh.node("b", max_disk_bytes=5 * MB) as node:
        with pytest.raises(InputError) as caught, trio.fail_after(DEADLINE_S):
            await fetch_files(node.files, model, node.folder, [0, 1, 2])
        assert caught.value.code == "NO_ROOM"
        assert "6,001,000 bytes are needed" in str(caught.value)
        assert "--max-disk of 5,000,000 bytes" in str(caught.value)
        assert source.n_bytes_given == 0
        assert node.files.downloads() == []
        await fetch_files(node.files, model, node.folder, [0, 1])
        with pytest.raises(InputError, match="2,000,000 bytes are needed"):  # what is here is here
            await fetch_files(node.files, model, node.folder, [0, 1, 2])


@pytest.fixture
def small_disk(tmp_path: Path):  # type: ignore[no-untyped-def]
    """A folder on a disk of 32 MB, where that can be made."""
    folder = tmp_path / "b"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs a disk of its own, which only root can make")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def n_bytes_of_partial(folder: Path) -> int:
    """What unfinished files really take."""
    return sum(path.stat().st_blocks * 512 for path in folder.glob(".partial/*/*.gguf"))


def fill(disk: Path) -> Path:
    """A file that takes all that is free."""
    other = disk / "other"
    with pytest.raises(OSError, match="No space"):
        other.write_bytes(bytes(40 * MB))
    return other


async def test_a_disk_without_room_for_all_files(tmp_path: Path, small_disk: Path) -> None:
    model = make_model(tmp_path / "a", 10 * MB, 10 * MB)
    mesh = FileMesh(tmp_path)
    async with mesh.node("a") as source, mesh.node("b") as node:
        with pytest.raises(InputError, match="20,010,000 bytes are needed") as caught:
            await fetch_files(node.files, model, small_disk, [0, 1])
        assert caught.value.code == "NO_ROOM"
        assert source.n_bytes_given == 0


async def test_the_disk_becomes_full(tmp_path: Path, small_disk: Path) -> None:
    """Somebody else fills it meanwhile: a typed error, no file, and it goes on with what it has."""
    model = make_model(tmp_path / "a", 10 * MB)
    mesh = FileMesh(tmp_path)
    async with mesh.node("a", upload_rate_bytes_per_s=4 * MB) as source, mesh.node("b") as node:
        caught: list[ShardmeshError] = []

        async def fetch_and_fail() -> None:
            try:
                await fetch(node, model)
            except ShardmeshError as error:
                caught.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch_and_fail)
            await wait_until(lambda: n_bytes_of_partial(small_disk) > 4 * MB, "a part is written")
            other = fill(small_disk)
        n_before = source.n_bytes_given
        assert [error.code for error in caught] == ["NO_ROOM"]
        assert not (small_disk / "shard-0.gguf").exists()
        with pytest.raises(InputError, match="no room"):  # before anything is fetched, this time
            await fetch(node, model)
        other.unlink()
        assert is_right(await fetch(node, model), model)
        assert source.n_bytes_given - n_before < 8 * MB  # what was under way is lost
        assert leftovers(node.folder) == []
