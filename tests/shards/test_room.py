"""Room for files: set-aside ones count, and the oldest go when their room is needed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.torrents import MB, make_model

from shardmesh.errors import InputError
from shardmesh.shards.library import Library
from shardmesh.shards.room import ROOM_TO_SPARE_BYTES, make_room

BLOCK_BYTES = 4096


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """Two models; of one, two files were set aside, the second one earlier."""
    make_model(tmp_path / "shards", 1 * MB, name="flat")
    make_model(tmp_path / "other", 1 * MB, name="other", seed=1)
    for shard_id, time_s in ((0, 2_000), (1, 1_000)):
        path = tmp_path / "shards" / f"shard-{shard_id}.gguf.set-aside"
        path.write_bytes(b"x" * 50 * BLOCK_BYTES)
        os.utime(path, (time_s, time_s))
    return Library(tmp_path / "shards", tmp_path)


def aside(library: Library) -> list[str]:
    return [path.name.removesuffix(".gguf.set-aside") for path in library.set_aside()]


def test_files_set_aside_count(library: Library) -> None:
    before = library.n_bytes()
    assert aside(library) == ["shard-1", "shard-0"]
    library.set_aside()[0].unlink()
    assert library.n_bytes() == before - 50 * BLOCK_BYTES


@pytest.mark.parametrize(
    ("n_blocks", "left"),
    [
        (10, ["shard-1", "shard-0"]),
        (11, ["shard-0"]),
        (60, ["shard-0"]),
        (61, []),
        (110, []),
    ],
)
def test_the_oldest_go_as_far_as_room_is_needed(
    library: Library, n_blocks: int, left: list[str]
) -> None:
    limit = library.n_bytes() + 10 * BLOCK_BYTES
    make_room("it", n_blocks * BLOCK_BYTES, library.shards_dir, library, max_bytes=limit)
    assert aside(library) == left


def test_nothing_is_removed_for_what_finds_no_room_even_so(library: Library) -> None:
    limit = library.n_bytes() + 10 * BLOCK_BYTES
    with pytest.raises(InputError) as caught:
        make_room("it", 110 * BLOCK_BYTES + 1, library.shards_dir, library, max_bytes=limit)
    assert caught.value.code == "NO_ROOM"
    assert "450,561 bytes are needed" in str(caught.value)
    assert f"--max-disk of {limit:,} bytes leaves 40,960" in str(caught.value)
    assert len(aside(library)) == 2


@pytest.mark.parametrize(("n_bytes", "n_left"), [(1000, 2), (1001, 1)])
def test_the_disk_has_no_more(
    library: Library, monkeypatch: pytest.MonkeyPatch, n_bytes: int, n_left: int
) -> None:
    full = shutil.disk_usage(library.shards_dir)._replace(free=ROOM_TO_SPARE_BYTES + 3000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    where = library.shards_dir
    make_room("it", n_bytes, where, library, max_bytes=0, n_promised=2000)
    assert len(aside(library)) == n_left
    with pytest.raises(InputError, match="1,000,000 bytes are needed, 0 are free"):
        make_room("it", 1 * MB, where, library, max_bytes=0, n_promised=4000)
