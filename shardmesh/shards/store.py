"""The folder of a node's shard files: what is there, and whether it is what it should be."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Final

from shardmesh.errors import GgufError, InputError
from shardmesh.shards.atomic import storage_errors
from shardmesh.shards.checked import sha256_of
from shardmesh.shards.gguf_check import read_gguf
from shardmesh.shards.gguf_file import GgufFile
from shardmesh.shards.layers import LayerRange
from shardmesh.shards.manifest import (
    MANIFEST_NAME,
    AdapterFile,
    Manifest,
    ShardEntry,
    TokenizerEntry,
    read_manifest,
)
from shardmesh.shards.names import TOKENIZER_NAME, adapter_name, shard_name
from shardmesh.wire.limits import SHARD_FILES_MAX

_LAYER_TENSOR: Final = re.compile(r"blk\.([0-9]+)\.")


@dataclasses.dataclass(frozen=True, order=True)
class StoredFile:
    """A GGUF file in the folder, whatever it holds."""

    name: str
    n_bytes: int


class ShardStore:
    """A folder with `shard-<id>.gguf`, `tokenizer.gguf` and `manifest.json`, as far as there.

    The folder is made if it is missing, unless `create` is false.  All methods read the disk anew.
    Every one raises StorageError (ours) when the disk fails.
    """

    def __init__(self, directory: Path, *, create: bool = True) -> None:
        self._directory = directory
        if create:
            with storage_errors(directory):
                directory.mkdir(parents=True, exist_ok=True)

    @property
    def directory(self) -> Path:
        return self._directory

    def scan(self) -> tuple[StoredFile, ...]:
        """Every visible `*.gguf` file, by name; SHARD_FILES_MAX at most."""
        if not self._directory.exists():
            return ()
        with storage_errors(self._directory):
            found = (
                StoredFile(path.name, path.stat().st_size)
                for path in self._directory.iterdir()
                if path.suffix == ".gguf" and not path.name.startswith(".") and path.is_file()
            )
            return tuple(sorted(itertools.islice(found, SHARD_FILES_MAX)))

    def manifest(self) -> Manifest | None:
        """The folder's manifest; None if there is none, InputError (theirs) if it is not good."""
        path = self._directory / MANIFEST_NAME
        return read_manifest(path) if path.exists() else None

    def by_digest(self, digest: str) -> ShardStore | None:
        """This folder if its manifest has that digest; a broken manifest has none."""
        try:
            manifest = self.manifest()
        except InputError:
            return None
        return self if manifest is not None and manifest.digest() == digest else None

    def shard_path(self, shard_id: int) -> Path:
        """Where a shard lies or would lie; InputError (theirs) for an impossible number."""
        return self._directory / shard_name(shard_id)

    def tokenizer_path(self) -> Path:
        """Where the tokenizer lies or would lie."""
        return self._directory / TOKENIZER_NAME

    def check(self, shard_id: int) -> ShardEntry | None:
        """The shard, proven whole and what the manifest says; None if its file is not there.

        Without a manifest the file is held only against itself.  Reads the whole file, unless it
        was hashed before and has not changed since.  Raises GgufError (theirs) when it is wrong.
        """
        path = self.shard_path(shard_id)
        if not path.exists():
            return None
        manifest = self.manifest()
        if manifest is not None and shard_id >= len(manifest.shards):
            raise _wrong(path, f"is not in the manifest, which has {len(manifest.shards)} shards")
        expected = None if manifest is None else manifest.shards[shard_id]
        n_bytes, sha256 = self._digest(path, expected)
        shard = read_gguf(path)
        layers, n_layer = layers_of(shard)
        own_id = shard.get_int("shardmesh.shard_id", 0)
        if own_id != shard_id:
            raise _wrong(path, f"is shard {own_id} by what it says")
        if manifest is not None and n_layer != manifest.n_layer:
            raise _wrong(path, f"is of a model of {n_layer} layers, not {manifest.n_layer}")
        if expected is not None and layers != expected.layers:
            raise _wrong(path, f"holds layers {layers}, not {expected.layers}")
        return expected or ShardEntry(
            shard_id=shard_id,
            layer_start=layers.layer_start,
            layer_end=layers.layer_end,
            n_bytes=n_bytes,
            sha256=sha256,
        )

    def check_tokenizer(self) -> TokenizerEntry | None:
        """The tokenizer, proven like a shard in `check`; None if its file is not there."""
        path = self.tokenizer_path()
        if not path.exists():
            return None
        manifest = self.manifest()
        n_bytes, sha256 = self._digest(path, None if manifest is None else manifest.tokenizer)
        read_gguf(path)
        return TokenizerEntry(n_bytes=n_bytes, sha256=sha256)

    def adapters(self, shard_id: int) -> dict[str, Path | None]:
        """The LoRA adapters of the manifest whose part for this shard is here, by name.

        None for one that changes nothing in it.  Raises GgufError (theirs) for a wrong file.
        """
        manifest = self.manifest()
        found: dict[str, Path | None] = {}
        for number, adapter in enumerate(manifest.adapters if manifest is not None else ()):
            expected = adapter.files[shard_id] if shard_id < len(adapter.files) else None
            path = self._directory / adapter_name(number, shard_id)
            if expected is None:
                found[adapter.name] = None
            elif path.exists():
                self._digest(path, expected)
                found[adapter.name] = path
        return found

    def _digest(
        self, path: Path, expected: ShardEntry | TokenizerEntry | AdapterFile | None
    ) -> tuple[int, str]:
        """Size and SHA-256 of a file; GgufError (theirs) if others were expected."""
        with storage_errors(path):
            n_bytes = path.stat().st_size
            if expected is not None and n_bytes != expected.n_bytes:
                raise _wrong(path, f"has {n_bytes} bytes, not {expected.n_bytes}")
            sha256 = sha256_of(path)
        if expected is not None and sha256 != expected.sha256:
            raise _wrong(path, "does not have the SHA-256 of the manifest")
        return n_bytes, sha256


def layers_of(shard: GgufFile) -> tuple[LayerRange, int]:
    """A shard's layers and how many the whole model has; a model that was never cut has all.

    Raises GgufError (theirs) when the numbers contradict each other, or a tensor belongs to a layer
    that the file does not say it has.
    """
    n_own = shard.n_layer
    start = shard.get_int("shardmesh.layer_start", 0)
    end = shard.get_int("shardmesh.layer_end", n_own)
    n_layer = shard.get_int("shardmesh.n_layer", n_own)
    if not 0 <= start < end <= n_layer or end - start != n_own:
        raise _wrong(shard.path, f"says layers {start} to {end} of {n_layer}, but has {n_own}")
    for tensor in shard.tensors:
        match = _LAYER_TENSOR.match(tensor.name)
        if match is not None and int(match[1]) >= n_own:
            raise _wrong(shard.path, f"has {n_own} layers, but tensor {tensor.name}")
    return LayerRange(start, end), n_layer


def _wrong(path: Path, what: str) -> GgufError:
    return GgufError(
        f"{path} {what}",
        code="BAD_SHARD",
        next_step="remove the file and fetch it again, or split the model again",
    )
