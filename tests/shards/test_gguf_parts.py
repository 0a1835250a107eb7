"""Models in several files."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from support.models import TensorData, string_value, write_gguf

from shardmesh.errors import GgufError
from shardmesh.shards.gguf_check import read_gguf


def uint16(value: int) -> bytes:
    return struct.pack("<IH", 2, value)


def write_parts(folder: Path, names: list[str], numbers: list[int] | None = None) -> list[Path]:
    """One file per tensor name; the first has the metadata."""
    paths = []
    for index, name in enumerate(names):
        path = folder / f"m-{index + 1:05d}-of-{len(names):05d}.gguf"
        values = {
            "split.no": uint16(index if numbers is None else numbers[index]),
            "split.count": uint16(len(names)),
        }
        if index == 0:
            values["general.architecture"] = string_value("llama")
        write_gguf(path, values, [TensorData(name, (2,), 0, bytes([index]) * 8)])
        paths.append(path)
    return paths


def test_any_part_stands_for_the_whole(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, ["a", "b", "c"])
    for path in paths:
        model = read_gguf(path)
        assert [(each.name, each.path) for each in model.tensors] == list(
            zip("abc", paths, strict=True)
        )
        assert model.path == paths[0]
        assert model.architecture == "llama"
        assert not any(key.startswith("split.") for key in model.metadata)
        assert model.n_bytes == sum(each.stat().st_size for each in paths)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, ["a", "b", "c"])
    paths[1].unlink()
    with pytest.raises(GgufError, match=r"m-00002-of-00003\.gguf is missing"):
        read_gguf(paths[0])


def test_parts_that_contradict_their_names_are_refused(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, ["a", "b", "c"], numbers=[0, 2, 1])
    with pytest.raises(GgufError, match="is not part 2 of 3"):
        read_gguf(paths[0])


def test_a_renamed_part_is_not_taken_for_a_model(tmp_path: Path) -> None:
    part = write_parts(tmp_path, ["a", "b"])[0].rename(tmp_path / "model.gguf")
    with pytest.raises(GgufError, match="is not part 1 of 1"):
        read_gguf(part)


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="tensor of one name"):
        read_gguf(write_parts(tmp_path, ["a", "a"])[0])
