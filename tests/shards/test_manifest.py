"""Manifests: strict, readable, one digest for one content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.manifests import a_manifest

from shardmesh.errors import InputError, StorageError
from shardmesh.shards.manifest import (
    read_manifest,
    write_manifest,
)
from shardmesh.wire.limits import PIECE_TOKENS_MAX, PIECE_TOKENS_MIN


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_manifest(a_manifest(), path)
    assert read_manifest(path) == a_manifest()
    assert read_manifest(path).digest() == a_manifest().digest()
    assert [each.name for each in tmp_path.iterdir()] == ["manifest.json"]


def test_the_digest_stays_what_it_is() -> None:
    """Nodes of different versions compare it."""
    assert a_manifest().digest() == (
        "47fc1b4cdd828d8aa4211768a3edfe89d129c0509f38696c6e735a6ed25fee64"
    )


def change(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(msgspec.json.encode(a_manifest()))
    inner: Any = tree
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 2),
        (("schema_version",), "1"),
        (("model_name",), ""),
        (("model_name",), "x" * 129),
        (("model_name",), "a\nb"),
        (("architecture",), "../llama"),
        (("n_layer",), 7),
        (("n_layer",), 513),
        (("n_layer",), 6.0),
        (("n_embd",), 0),
        (("piece_tokens",), 0),
        (("piece_tokens",), -32),
        (("piece_tokens",), PIECE_TOKENS_MIN // 2),
        (("piece_tokens",), 48),
        (("piece_tokens",), 2 * PIECE_TOKENS_MAX),
        (("piece_tokens",), "32"),
        (("unknown",), 1),
        (("shards",), []),
        (("shards", 1, "shard_id"), 2),
        (("shards", 1, "layer_start"), 3),
        (("shards", 1, "layer_start"), 1),
        (("shards", 1, "layer_end"), 2),
        (("shards", 2, "layer_end"), 5),
        (("shards", 0, "layer_start"), -1),
        (("shards", 0, "n_bytes"), 0),
        (("shards", 0, "n_bytes"), True),
        (("shards", 0, "n_bytes"), 2**64),
        (("shards", 0, "sha256"), "AB" * 32),
        (("shards", 0, "sha256"), "ab" * 32 + "\n"),
        (("shards", 0, "sha256"), "ab" * 31),
        (("shards", 0, "path"), "/etc/passwd"),
        (("tokenizer",), None),
        (("tokenizer", "sha256"), ""),
    ],
)
def test_a_changed_manifest_is_refused(
    tmp_path: Path, path: tuple[str | int, ...], value: Any
) -> None:
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(change(path, value)))
    with pytest.raises(InputError) as caught:
        read_manifest(file)
    assert caught.value.code == "BAD_MANIFEST"
    assert caught.value.next_step


@pytest.mark.parametrize("key", list(json.loads(msgspec.json.encode(a_manifest()))))
def test_every_field_is_needed_and_in_the_digest(tmp_path: Path, key: str) -> None:
    tree = json.loads(msgspec.json.encode(a_manifest()))
    del tree[key]
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(tree))
    with pytest.raises(InputError, match=key):
        read_manifest(file)


@pytest.mark.parametrize("piece_tokens", [16, 32, 64, 128, 256, 512])
def test_the_length_of_pieces_is_kept_and_in_the_digest(tmp_path: Path, piece_tokens: int) -> None:
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(change(("piece_tokens",), piece_tokens)))
    found = read_manifest(file)
    assert found.piece_tokens == piece_tokens
    assert (found.digest() == a_manifest().digest()) == (piece_tokens == a_manifest().piece_tokens)


def test_a_wrong_length_of_pieces_is_said_clearly(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(change(("piece_tokens",), 100)))
    with pytest.raises(InputError, match=r"pieces of 100 tokens.*power of two from 16 to 512"):
        read_manifest(file)


def test_a_model_has_shards(tmp_path: Path) -> None:
    tree = change(("n_layer",), 0)
    tree["shards"] = []
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(tree))
    with pytest.raises(InputError):
        read_manifest(file)


def test_the_digest_follows_the_content() -> None:
    other = msgspec.structs.replace(a_manifest(), quantization="Q8_0")
    assert other.digest() != a_manifest().digest()


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", b'{"a": NaN}', b"\xff", b" " * 2_000_000, b'{"n_layer":1' * 9]
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "manifest.json"
    file.write_bytes(data)
    with pytest.raises(InputError):
        read_manifest(file)


def test_missing_files_and_folders_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_manifest(tmp_path / "manifest.json")
    with pytest.raises(StorageError):
        read_manifest(tmp_path)
    with pytest.raises(StorageError):
        write_manifest(a_manifest(), tmp_path / "missing" / "manifest.json")


def test_a_bad_manifest_is_never_written(tmp_path: Path) -> None:
    bad = msgspec.structs.replace(a_manifest(), n_layer=9)
    with pytest.raises(InputError):
        write_manifest(bad, tmp_path / "manifest.json")
    assert list(tmp_path.iterdir()) == []
