"""One reading of a file gives its SHA-256 and the torrent that libtorrent would make."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import libtorrent as lt
import pytest

from shardmesh.shards import checked
from shardmesh.shards.checked import hashes_of, sha256_of
from shardmesh.shards.hashing import hash_file

PIECE = 256 * 1024


@pytest.mark.parametrize(
    "n_bytes", [1, 16 * 1024, 16 * 1024 + 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 1_500_000]
)
def test_libtorrent_comes_to_the_same(tmp_path: Path, n_bytes: int) -> None:
    path = tmp_path / "shard-3.gguf"
    path.write_bytes(random.Random(n_bytes).randbytes(n_bytes))
    n_read: list[int] = []
    hashed = hash_file(path, progress=n_read.append)
    assert sum(n_read) == n_bytes
    assert hashed.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    made = lt.create_torrent(
        lt.list_files(str(path)), hashed.torrent.piece_bytes, lt.create_torrent.v2_only
    )
    made.set_priv(True)
    lt.set_piece_hashes(made, str(tmp_path))
    expected = lt.torrent_info(made.generate()).info_hashes().v2.to_bytes()
    assert hashed.torrent.info_hash() == expected


def test_hashes_are_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shard-0.gguf"
    path.write_bytes(b"a" * 300_000)
    first = hashes_of(path)
    with monkeypatch.context() as patched:
        patched.setattr(checked, "hash_file", lambda path: pytest.fail("read again"))
        assert hashes_of(path) == first
        assert sha256_of(path) == first.sha256
    path.write_bytes(b"b" * 300_000)
    os.utime(path, ns=(1, 1))
    assert hashes_of(path).sha256 == hashlib.sha256(b"b" * 300_000).hexdigest()
    assert sha256_of(path) == hashes_of(path).sha256


@pytest.mark.parametrize("damage", [b"", b"rubbish", None])
def test_a_damaged_memory_means_hashing_again(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "shard-0.gguf"
    path.write_bytes(b"a" * 300_000)
    first = hashes_of(path)
    remembered = tmp_path / ".torrents" / "shard-0.gguf.torrent"
    if damage is None:
        remembered.unlink()
    else:
        remembered.write_bytes(damage)
    assert hashes_of(path) == first
