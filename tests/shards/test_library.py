"""Several models side by side: found by digest and by name, removed whole and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.torrents import make_model

from shardmesh.errors import InputError
from shardmesh.shards.library import (
    Library,
    folder_name,
    remove_model,
    remove_shards,
    require_shards,
)
from shardmesh.shards.store import ShardStore


@pytest.fixture
def library(tmp_path: Path) -> Library:
    make_model(tmp_path / "models" / "shards", 1000, 2000, name="flat")
    make_model(tmp_path / "models" / "one", 3000, name="one", seed=1)
    make_model(tmp_path / "models" / "two", 4000, name="one", seed=2)
    (tmp_path / "models" / "empty").mkdir()
    (tmp_path / "models" / "broken").mkdir()
    (tmp_path / "models" / "broken" / "manifest.json").write_text("{")
    return Library(tmp_path / "models" / "shards", tmp_path / "models")


def test_the_shard_folder_comes_first_and_once(library: Library) -> None:
    names = [store.directory.name for store in library.stores()]
    assert names == ["shards", "broken", "empty", "one", "two"]
    assert library.n_files() == 3 + 2 + 2
    assert [p.manifest.model_name for p in library.publications()] == ["flat", "one", "one"]


def test_by_name_by_digest_by_folder(library: Library) -> None:
    assert library.by_name("flat").directory.name == "shards"
    two = library.by_name("two")
    manifest = two.manifest()
    assert manifest is not None
    assert library.by_name(manifest.digest()[:10]).directory == two.directory
    found = library.by_digest(manifest.digest())
    assert found is not None
    assert found.directory == two.directory
    assert library.folder_for("another name", manifest.digest()) == two.directory
    for name in ("one", "nobody", ""):  # two models are called so, or their folder; none is
        with pytest.raises(InputError) as caught:
            library.by_name(name)
        assert caught.value.code == "UNKNOWN_MODEL"


@pytest.mark.parametrize("name", ["../../etc", "/", "..", "a/b", "\\", "ä", "." * 200])
def test_a_folders_name_is_plain_whatever_the_model_is_called(name: str) -> None:
    made = folder_name(name, "ab" * 32)
    assert made.endswith("-abababab")
    assert set(made) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_a_shard_or_all_is_removed_and_nothing_else(library: Library) -> None:
    store = library.by_name("flat")
    (store.directory / "notes.txt").write_text("mine")
    for shard_id in (0, 1):
        (store.directory / f"shard-{shard_id}.gguf.set-aside").write_bytes(b"wrong")
    before = library.n_bytes()
    assert remove_shards(store, [1]) > 0
    assert library.n_bytes() < before
    assert [file.name for file in store.scan()] == ["shard-0.gguf", "tokenizer.gguf"]
    assert [path.name for path in library.set_aside()] == ["shard-0.gguf.set-aside"]
    remove_model(store)
    assert [path.name for path in store.directory.iterdir()] == ["notes.txt"]
    remove_model(ShardStore(library.by_name("two").directory, create=False))
    assert library.by_name("one").directory.name == "one"


def test_shards_that_are_not_here_are_named(library: Library) -> None:
    store = library.by_name("flat")
    require_shards(store, [0, 1])
    with pytest.raises(InputError, match=r"does not have shard 2, shard 7$") as caught:
        require_shards(store, [7, 0, 2, 7])
    assert caught.value.code == "SHARD_NOT_FOUND"
    (store.directory / "shard-1.gguf").replace(store.directory / "shard-1.gguf.set-aside")
    require_shards(store, [1])  # there is something to remove
