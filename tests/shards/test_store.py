"""The folder of shard files: what is listed, what is checked, what is remembered."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from support.models import BUILT_IN, write_model

from shardmesh.errors import GgufError, InputError, StorageError
from shardmesh.shards import checked
from shardmesh.shards.gguf_check import read_gguf
from shardmesh.shards.layers import LayerRange, ranges_of_counts
from shardmesh.shards.manifest import Manifest
from shardmesh.shards.split import split_model
from shardmesh.shards.store import ShardStore, StoredFile, layers_of


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    model = write_model(tmp_path / "model.gguf", vocabulary=BUILT_IN)
    return split_model(model, ranges_of_counts([1, 2, 1]), tmp_path / "shards", name="m")


@pytest.fixture
def store(manifest: Manifest, tmp_path: Path) -> ShardStore:
    return ShardStore(tmp_path / "shards")


def flip_a_byte(path: Path) -> None:
    """In the last weight; size and header stay."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def test_good_shards_are_what_the_manifest_says(store: ShardStore, manifest: Manifest) -> None:
    assert [store.check(shard_id) for shard_id in range(3)] == list(manifest.shards)
    assert store.check_tokenizer() == manifest.tokenizer
    assert store.manifest() == manifest


def test_everything_visible_is_listed(store: ShardStore, manifest: Manifest) -> None:
    folder = store.directory
    (folder / ".half.gguf").touch()
    (folder / "notes.txt").touch()
    (folder / "other.gguf").write_bytes(b"abc")
    (folder / "folder.gguf").mkdir()
    sizes = {f"shard-{shard.shard_id}.gguf": shard.n_bytes for shard in manifest.shards}
    sizes |= {"tokenizer.gguf": manifest.tokenizer.n_bytes, "other.gguf": 3}
    assert store.scan() == tuple(StoredFile(name, sizes[name]) for name in sorted(sizes))


def test_an_empty_folder_is_made_and_has_nothing(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "a" / "b")
    assert (store.scan(), store.manifest(), store.check(0), store.check_tokenizer()) == (
        (),
        None,
        None,
        None,
    )
    assert store.directory.is_dir()


def test_reading_only_makes_no_folder(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "a", create=False)
    assert (store.scan(), store.check(0)) == ((), None)
    assert not store.directory.exists()


def test_a_folder_that_cannot_be_made_is_ours(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        ShardStore(tmp_path / "file" / "shards")


@pytest.mark.parametrize("shard_id", [-1, 512, 10**9])
def test_impossible_numbers_have_no_path(store: ShardStore, shard_id: int) -> None:
    with pytest.raises(InputError):
        store.shard_path(shard_id)


def test_a_flipped_byte_is_found(store: ShardStore) -> None:
    flip_a_byte(store.shard_path(1))
    flip_a_byte(store.tokenizer_path())
    with pytest.raises(GgufError, match="SHA-256") as caught:
        store.check(1)
    assert caught.value.code == "BAD_SHARD"
    with pytest.raises(GgufError, match="SHA-256"):
        store.check_tokenizer()
    assert store.check(0) is not None


def test_a_truncated_shard_is_found(store: ShardStore) -> None:
    with store.shard_path(1).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(GgufError, match="has 1000 bytes, not"):
        store.check(1)


def test_swapped_shards_are_found_without_a_manifest_too(store: ShardStore) -> None:
    one, other = store.shard_path(0), store.shard_path(2)
    one.rename(store.directory / "kept")
    other.rename(one)
    (store.directory / "kept").rename(other)
    with pytest.raises(GgufError, match="bytes, not"):
        store.check(0)
    (store.directory / "manifest.json").unlink()
    with pytest.raises(GgufError, match="is shard 2 by what it says"):
        store.check(0)


def test_a_shard_of_another_cut_is_found(store: ShardStore, tmp_path: Path) -> None:
    """Even with a manifest that was made to fit its size and digest."""
    manifest_path = store.directory / "manifest.json"
    split_model(tmp_path / "model.gguf", ranges_of_counts([2, 1, 1]), tmp_path / "b", name="m")
    text = manifest_path.read_text()
    foreign = tmp_path / "b" / "shard-1.gguf"
    entry = store.check(1)
    assert entry is not None
    text = text.replace(entry.sha256, hashlib.sha256(foreign.read_bytes()).hexdigest())
    text = text.replace(f'"n_bytes": {entry.n_bytes},', f'"n_bytes": {foreign.stat().st_size},')
    manifest_path.write_text(text)
    foreign.replace(store.shard_path(1))
    with pytest.raises(GgufError, match=r"holds layers \[2, 3\), not \[1, 3\)"):
        store.check(1)


def test_shards_beyond_the_manifest_are_refused(store: ShardStore) -> None:
    store.shard_path(3).write_bytes(store.shard_path(2).read_bytes())
    with pytest.raises(GgufError, match="not in the manifest, which has 3 shards"):
        store.check(3)


def test_without_a_manifest_a_shard_speaks_for_itself(
    store: ShardStore, manifest: Manifest
) -> None:
    (store.directory / "manifest.json").unlink()
    assert store.check(1) == manifest.shards[1]


def test_a_whole_model_is_shard_0_of_1(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "shards")
    write_model(store.shard_path(0), vocabulary=BUILT_IN, n_layer=3)
    entry = store.check(0)
    assert entry is not None
    assert entry.layers == LayerRange(0, 3)
    store.shard_path(0).rename(store.shard_path(1))
    with pytest.raises(GgufError, match="is shard 0 by what it says"):
        store.check(1)


def test_shards_that_contradict_themselves_are_refused(store: ShardStore) -> None:
    path = store.shard_path(1)
    content = path.read_bytes()
    at = content.index(b"shardmesh.layer_end") + len(b"shardmesh.layer_end") + 4
    path.write_bytes(content[:at] + b"\x04" + content[at + 1 :])
    with pytest.raises(GgufError, match="says layers 1 to 4 of 4, but has 2"):
        layers_of(read_gguf(path))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read through."""
    names: list[str] = []
    real = hashlib.file_digest

    def file_digest(file, kind):  # type: ignore[no-untyped-def]
        names.append(Path(file.name).name)
        return real(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    return names


def test_a_file_is_hashed_only_once(
    store: ShardStore, manifest: Manifest, hashed: list[str]
) -> None:
    for _ in range(3):
        for shard in manifest.shards:
            assert ShardStore(store.directory).check(shard.shard_id) == shard
    assert hashed == ["shard-0.gguf", "shard-1.gguf", "shard-2.gguf"]


def test_a_changed_file_is_hashed_again(store: ShardStore, hashed: list[str]) -> None:
    store.check(0)
    path = store.shard_path(0)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    store.check(0)
    copy = store.directory / "copy"
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    copy.rename(path)  # the same size and time, another inode
    store.check(0)
    assert hashed == ["shard-0.gguf"] * 3


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"files": {"shard-0.gguf": 1}}'])
def test_a_broken_memory_only_means_hashing_again(
    store: ShardStore, hashed: list[str], data: bytes
) -> None:
    store.check(0)
    (store.directory / checked.CHECKED_NAME).write_bytes(data)
    assert store.check(0) is not None
    assert store.check(0) is not None
    assert hashed == ["shard-0.gguf"] * 2


def test_a_remembered_digest_is_still_held_against_the_manifest(store: ShardStore) -> None:
    entry = store.check(0)
    assert entry is not None
    path = store.directory / "manifest.json"
    path.write_text(path.read_text().replace(entry.sha256, "0" * 64))
    with pytest.raises(GgufError, match="SHA-256"):
        store.check(0)


def test_files_that_are_gone_are_forgotten(store: ShardStore) -> None:
    store.check(0)
    store.shard_path(0).unlink()
    store.check(1)
    memory = (store.directory / checked.CHECKED_NAME).read_text()
    assert "shard-1.gguf" in memory
    assert "shard-0.gguf" not in memory
