"""The splitter: the same bytes, only whole files, nothing left behind."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from support.models import (
    ARCHITECTURES,
    BUILT_IN,
    string_value,
    u32_value,
    write_gguf,
    write_model,
)
from support.parts import write_in_parts

from shardmesh.errors import GgufError, InputError, StorageError
from shardmesh.shards import split, staging
from shardmesh.shards.gguf_check import read_gguf
from shardmesh.shards.layers import LayerRange, ranges_of_counts
from shardmesh.shards.manifest import ShardEntry, TokenizerEntry, read_manifest
from shardmesh.shards.publication import PUBLICATION_NAME
from shardmesh.shards.room import ROOM_TO_SPARE_BYTES
from shardmesh.shards.split import quantization_of, split_model

HALVES = ranges_of_counts([2, 2])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.gguf", vocabulary=BUILT_IN)


def tensors_of(path: Path) -> dict[str, bytes]:
    return {tensor.name: np.asarray(tensor.data).tobytes() for tensor in GGUFReader(path).tensors}


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_arrives_unchanged(tmp_path: Path, architecture: str, tied: bool) -> None:
    rope = not architecture.startswith("qwen")
    path = write_model(
        tmp_path / "m.gguf",
        architecture,
        weights="q8_0",
        vocabulary=BUILT_IN,
        tied=tied,
        rope_tensors=rope,
    )
    split_model(path, ranges_of_counts([1, 2, 1]), tmp_path / "out", name="m")
    source = tensors_of(path)
    shards = [tensors_of(tmp_path / "out" / f"shard-{i}.gguf") for i in range(3)]
    for start, n_layer, shard in ((0, 1, shards[0]), (1, 2, shards[1]), (3, 1, shards[2])):
        expected = {
            f"blk.{layer}.{rest}": source[f"blk.{start + layer}.{rest}"]
            for layer in range(n_layer)
            for rest in (name[6:] for name in source if name.startswith("blk.0."))
        }
        expected |= {name: data for name, data in source.items() if name.startswith("rope_")}
        expected["output_norm.weight"] = source["output_norm.weight"]
        assert {k: v for k, v in shard.items() if k != "token_embd.weight"} == expected
    head = source["token_embd.weight" if tied else "output.weight"]
    assert shards[0]["token_embd.weight"] == source["token_embd.weight"]
    assert shards[1]["token_embd.weight"] == bytes(4 * 64)
    assert shards[2]["token_embd.weight"] == head


def test_one_shard_is_the_whole_model(model: Path, tmp_path: Path) -> None:
    split_model(model, ranges_of_counts([4]), tmp_path / "out", name="m")
    assert tensors_of(tmp_path / "out" / "shard-0.gguf") == tensors_of(model)


def test_metadata_is_cut_to_the_range(model: Path, tmp_path: Path) -> None:
    split_model(model, ranges_of_counts([1, 2, 1]), tmp_path / "out", name="tale")
    shards = [read_gguf(tmp_path / "out" / f"shard-{i}.gguf") for i in range(3)]
    source = read_gguf(model)
    for shard_id, (shard, n_layer) in enumerate(zip(shards, (1, 2, 1), strict=True)):
        assert shard.n_layer == n_layer
        assert shard.metadata["llama.feed_forward_length"].n_items == n_layer
        assert shard.metadata["llama.rope.freq_base"] == source.metadata["llama.rope.freq_base"]
        assert "tokenizer.chat_template" not in shard.metadata
        own = {k: v.items()[0] for k, v in shard.metadata.items() if k.startswith("shardmesh.")}
        assert own == {
            "shardmesh.shard_id": shard_id,
            "shardmesh.n_shards": 3,
            "shardmesh.layer_start": (0, 1, 3)[shard_id],
            "shardmesh.layer_end": (1, 3, 4)[shard_id],
            "shardmesh.n_layer": 4,
            "shardmesh.model_name": "tale",
        }
    n_vocab = source.metadata["tokenizer.ggml.tokens"].n_items
    assert shards[0].metadata["tokenizer.ggml.tokens"] == source.metadata["tokenizer.ggml.tokens"]
    assert [shard.get_int("llama.vocab_size") for shard in shards] == [n_vocab, 1, n_vocab]
    assert [shard.get_text("tokenizer.ggml.model") for shard in shards[1:]] == ["none", "none"]


def test_an_array_of_other_length_is_kept(tmp_path: Path, model: Path) -> None:
    content = model.read_bytes().replace(
        b"llama.feed_forward_length", b"llama.rope.dimension_sections"[:25]
    )
    model.write_bytes(content)
    key = b"llama.rope.dimension_sections"[:25].decode()
    split_model(model, HALVES, tmp_path / "out", name="m")
    assert read_gguf(tmp_path / "out" / "shard-0.gguf").metadata[key].n_items == 2


def test_the_tokenizer_has_everything_but_weights(model: Path, tmp_path: Path) -> None:
    split_model(model, HALVES, tmp_path / "out", name="m")
    source, tokenizer = read_gguf(model), read_gguf(tmp_path / "out" / "tokenizer.gguf")
    assert not tokenizer.tensors
    expected = {k: v for k, v in source.metadata.items() if k.startswith("tokenizer.")}
    assert "tokenizer.chat_template" in expected
    assert expected.items() <= tokenizer.metadata.items()


def test_the_manifest_describes_the_files(model: Path, tmp_path: Path) -> None:
    written: list[int] = []
    manifest = split_model(model, HALVES, tmp_path / "out", name="tale", progress=written.append)
    out = tmp_path / "out"
    assert read_manifest(out / "manifest.json") == manifest
    entries: dict[str, ShardEntry | TokenizerEntry] = {
        f"shard-{shard.shard_id}.gguf": shard for shard in manifest.shards
    }
    entries["tokenizer.gguf"] = manifest.tokenizer
    for name, entry in entries.items():
        data = (out / name).read_bytes()
        assert (entry.n_bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert [shard.layers for shard in manifest.shards] == list(HALVES)
    assert (manifest.architecture, manifest.n_layer, manifest.n_embd) == ("llama", 4, 64)
    assert sum(written) == sum(path.stat().st_size for path in out.glob("*.gguf"))
    assert files_in(out) == {"shard-0.gguf", "shard-1.gguf", "tokenizer.gguf", "manifest.json"}


def test_a_split_says_the_same_each_time(model: Path, tmp_path: Path) -> None:
    first = split_model(model, HALVES, tmp_path / "a", name="m")
    assert split_model(model, HALVES, tmp_path / "b", name="m").digest() == first.digest()
    other = split_model(model, ranges_of_counts([1, 3]), tmp_path / "c", name="m")
    assert other.digest() != first.digest()


def test_parts_give_the_same_shards_as_one_file(model: Path, tmp_path: Path) -> None:
    paths = write_in_parts(model, tmp_path)
    whole = split_model(model, HALVES, tmp_path / "a", name="m")
    parts = split_model(paths[0], HALVES, tmp_path / "b", name="m")
    assert parts == whole


def test_what_was_published_of_an_earlier_split_goes_with_it(model: Path, tmp_path: Path) -> None:
    """It signs a manifest that is not there any more: each look at the folder would complain."""
    split_model(model, HALVES, tmp_path / "a", name="m")
    published = tmp_path / "a" / PUBLICATION_NAME
    published.write_bytes(b"of the split before")
    split_model(model, ranges_of_counts([1, 3]), tmp_path / "a", name="m")
    assert not published.exists()


class Stop(Exception):  # noqa: N818 - stands for any interruption
    pass


def stop_after(n_bytes: int) -> Any:
    remaining = n_bytes

    def progress(n: int) -> None:
        nonlocal remaining
        remaining -= n
        if remaining < 0:
            raise Stop

    return progress


@pytest.mark.parametrize("n_bytes", [0, 50_000, 200_000, 400_000])
def test_a_broken_off_split_leaves_nothing(model: Path, tmp_path: Path, n_bytes: int) -> None:
    with pytest.raises(Stop):
        split_model(model, HALVES, tmp_path / "a" / "b", name="m", progress=stop_after(n_bytes))
    assert files_in(tmp_path) == {"model.gguf"}


def test_a_killed_split_is_cleaned_up_by_the_next(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / staging.STAGING_NAME).mkdir(parents=True)
    (out / staging.STAGING_NAME / "shard-0.gguf").write_bytes(b"half")
    (out / ".split-lock").touch()  # left, but locked by nobody
    split_model(model, HALVES, out, name="m")
    assert files_in(out) == {"shard-0.gguf", "shard-1.gguf", "tokenizer.gguf", "manifest.json"}


def test_an_earlier_split_stays_whole_until_the_new_one_is(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = split_model(model, ranges_of_counts([1, 1, 1, 1]), out, name="m")
    with pytest.raises(Stop):
        split_model(model, HALVES, out, name="m", progress=stop_after(100_000))
    assert read_manifest(out / "manifest.json") == first
    (out / "notes.txt").write_text("mine")
    split_model(model, HALVES, out, name="m")
    assert files_in(out) == {
        "shard-0.gguf",
        "shard-1.gguf",
        "tokenizer.gguf",
        "manifest.json",
        "notes.txt",
    }


def test_two_splits_do_not_share_a_folder(model: Path, tmp_path: Path) -> None:
    with (tmp_path / ".split-lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another split is writing"):
            split_model(model, HALVES, tmp_path, name="m")


def failing_write(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The disk fails when the second file is written."""
    real = split.write_contents
    calls = 0

    def write_contents(*arguments: Any) -> str:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(number, "the disk says no")
        return real(*arguments)

    monkeypatch.setattr(split, "write_contents", write_contents)


def test_a_disk_that_fills_up_is_the_persons_to_solve(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_write(monkeypatch, errno.ENOSPC)
    with pytest.raises(InputError, match="no room") as caught:
        split_model(model, HALVES, tmp_path / "out", name="m")
    assert caught.value.code == "NO_ROOM"
    assert files_in(tmp_path) == {"model.gguf"}


def test_a_failing_disk_is_ours(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_write(monkeypatch, errno.EIO)
    with pytest.raises(StorageError, match="the disk says no"):
        split_model(model, HALVES, tmp_path / "out", name="m")
    assert files_in(tmp_path) == {"model.gguf"}


@pytest.mark.parametrize(("n_free", "told"), [(1_000, "1,000"), (0, "0"), (-1, "0")])
def test_room_is_checked_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_free: int, told: str
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=ROOM_TO_SPARE_BYTES + n_free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(InputError, match=f" {told} are free"):
        split_model(model, HALVES, tmp_path / "out" / "deep", name="m", progress=stop_after(0))
    assert files_in(tmp_path) == {"model.gguf"}


def test_a_rename_that_fails_takes_the_others_back(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "tokenizer.gguf").mkdir(parents=True)  # in the way
    with pytest.raises(StorageError):
        split_model(model, HALVES, tmp_path / "out", name="m")
    assert files_in(tmp_path / "out") == {"tokenizer.gguf"}


def test_a_source_that_shrinks_is_noticed(model: Path, tmp_path: Path) -> None:
    def shrink(_: int) -> None:
        with model.open("r+b") as file:
            file.truncate(100_000)

    with pytest.raises(GgufError, match="became shorter"):
        split_model(model, HALVES, tmp_path / "out", name="m", progress=shrink)
    assert files_in(tmp_path) == {"model.gguf"}


def test_the_model_itself_is_never_overwritten(model: Path, tmp_path: Path) -> None:
    shard_like = model.rename(tmp_path / "shard-0.gguf")
    before = shard_like.read_bytes()
    with pytest.raises(InputError, match="overwrite the model"):
        split_model(shard_like, HALVES, tmp_path, name="m")
    assert shard_like.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ((b"output_norm.weight", b"output_gnom.weight"), "no rule is known"),
        ((b"blk.3.attn_q.weight", b"blk.9.attn_q.weight"), "but only 4 layers"),
        ((b"blk.3.attn_q.weight", b"blk.03attn_q.weight"), "no rule is known"),
        ((b"token_embd.weight", b"rope_freqs.weight"), "has no tensor token_embd.weight"),
        ((b"context_length" + u32_value(512), b"context_length" + u32_value(0)), "has 0 under"),
        ((b"llama.block_count", b"llama.clock_count"), r"no whole number under llama\.block_count"),
    ],
)
def test_models_that_do_not_hang_together_are_refused(
    model: Path, tmp_path: Path, change: tuple[bytes, bytes], sentence: str
) -> None:
    model.write_bytes(model.read_bytes().replace(*change))
    with pytest.raises(GgufError, match=sentence):
        split_model(model, HALVES, tmp_path / "out", name="m")
    assert files_in(tmp_path) == {"model.gguf"}


def test_unknown_architectures_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    values = {"general.architecture": string_value("novel"), "novel.block_count": u32_value(4)}
    write_gguf(path, values, [])
    with pytest.raises(GgufError, match="'novel' is not among those") as caught:
        split_model(path, HALVES, tmp_path / "out", name="m")
    assert "tries first" in caught.value.next_step


def test_a_shard_is_not_split_again(model: Path, tmp_path: Path) -> None:
    split_model(model, HALVES, tmp_path / "out", name="m")
    one = (LayerRange(0, 2),)
    with pytest.raises(GgufError, match="is a shard already"):
        split_model(tmp_path / "out" / "shard-0.gguf", one, tmp_path / "again", name="m")


@pytest.mark.parametrize("name", ["", "x" * 129, "two\nlines", "\x1b[31m"])
def test_odd_names_are_refused(model: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="model name"):
        split_model(model, HALVES, tmp_path / "out", name=name)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("f32", "F32"), ("f16", "F16"), ("q8_0", "Q8_0"), ("q4_k", "Q4_K_M")],
)
def test_the_quantisation_is_named(tmp_path: Path, weights: str, expected: str) -> None:
    path = write_model(tmp_path / "m.gguf", weights=weights, vocabulary=BUILT_IN)
    assert quantization_of(read_gguf(path)) == expected
    path.write_bytes(path.read_bytes().replace(b"general.file_type", b"general.gone_type"))
    assert quantization_of(read_gguf(path)) == expected.removesuffix("_M")
