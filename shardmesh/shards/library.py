"""All models of a node: one in the flat shard folder, others side by side in folders of their own.

A folder's name is made here from the model's name and digest; no path comes from the network.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from shardmesh.errors import InputError, ShardmeshError, StorageError
from shardmesh.shards.checked import CHECKED_NAME, TORRENTS_NAME
from shardmesh.shards.manifest import MANIFEST_NAME, Manifest
from shardmesh.shards.names import TOKENIZER_NAME, adapter_name, shard_name
from shardmesh.shards.partial import ASIDE_SUFFIX, PARTIAL_NAME, disk_bytes
from shardmesh.shards.publication import PUBLICATION_NAME, OpenPublication, read_publication
from shardmesh.shards.store import ShardStore
from shardmesh.wire.limits import MODEL_FOLDERS_MAX

_DIGEST_CHARS = 8
_log = logging.getLogger(__name__)


class Library:
    """The folder of the model that a node serves, and the folders of all that it has.

    Nothing is kept in memory; each call looks at the disk.  Raises StorageError (ours).
    """

    def __init__(self, shards_dir: Path, models_dir: Path | None = None) -> None:
        self.shards_dir = shards_dir
        self.models_dir = models_dir

    def stores(self) -> list[ShardStore]:
        """The shard folder first, then every other folder with models, by name."""
        own = self.shards_dir.resolve()
        others = [f for f in self._model_folders() if f.resolve() != own]
        return [ShardStore(folder, create=False) for folder in (self.shards_dir, *others)]

    def _model_folders(self) -> list[Path]:
        if self.models_dir is None or not self.models_dir.is_dir():
            return []
        try:
            found = (
                path
                for path in self.models_dir.iterdir()
                if path.is_dir() and not path.name.startswith(".")
            )
            return sorted(itertools.islice(found, MODEL_FOLDERS_MAX))
        except OSError as error:
            raise StorageError(
                f"{self.models_dir} cannot be read: {error.strerror or error}"
            ) from error

    def by_digest(self, digest: str) -> ShardStore | None:
        """The folder of the model with this manifest; a broken manifest is nobody's."""
        return next((s for s in self.stores() if s.by_digest(digest)), None)

    def publications(self) -> list[OpenPublication]:
        """Every signed manifest that lies beside its manifest and belongs to it."""
        found = []
        for store in self.stores():
            manifest = manifest_or_none(store)
            try:
                opened = manifest and read_publication(store.directory, manifest)
            except ShardmeshError as error:
                _log.warning("%s is left aside: %s", store.directory / PUBLICATION_NAME, error)
                continue
            if opened:
                found.append(opened)
        return found

    def by_name(self, name: str) -> ShardStore:
        """The folder of the model of this name, or with a digest that begins so.

        Raises InputError (theirs, UNKNOWN_MODEL) if there is none, or more than one.
        """
        found = []
        for store in self.stores():
            manifest = manifest_or_none(store)
            if manifest is None:
                continue
            is_digest = len(name) >= _DIGEST_CHARS and manifest.digest().startswith(name)
            if name == manifest.model_name or is_digest or name == store.directory.name:
                found.append(store)
        if len(found) != 1:
            how_many = "no model" if not found else f"{len(found)} models"
            raise InputError(
                f"this node has {how_many} called {name}",
                code="UNKNOWN_MODEL",
                next_step="`shardmesh ls` shows names, digests and folders; name it by its folder",
            )
        return found[0]

    def folder_for(self, model_name: str, digest: str) -> Path:
        """Where a model belongs that is fetched: where it is already, or a folder of its own."""
        known = self.by_digest(digest)
        if known is not None:
            return known.directory
        if self.models_dir is None:
            return self.shards_dir
        return self.models_dir / folder_name(model_name, digest)

    def n_files(self) -> int:
        """GGUF files of all models."""
        return sum(len(store.scan()) for store in self.stores())

    def n_bytes(self) -> int:
        """Bytes that all files take on the disk, with those unfinished and those set aside."""
        return sum(disk_bytes(path) for store in self.stores() for path in _files(store.directory))

    def set_aside(self) -> list[Path]:
        """Files of all models that were set aside, oldest first."""
        found = [path for store in self.stores() for path in set_aside_in(store.directory)]
        return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def require_shards(store: ShardStore, shard_ids: Sequence[int]) -> None:
    """Raises InputError (theirs, SHARD_NOT_FOUND) unless there is something of each shard."""
    lacking = [i for i in sorted(set(shard_ids)) if not _named(store, _shard_names(store, [i]))]
    if lacking:
        which = ", ".join(f"shard {shard_id}" for shard_id in lacking)
        raise InputError(
            f"{store.directory} does not have {which}",
            code="SHARD_NOT_FOUND",
            next_step="`shardmesh ls` shows which shards are here",
        )


def remove_shards(store: ShardStore, shard_ids: Sequence[int]) -> int:
    """Removes these shards, whole, unfinished or set aside; gives the bytes that are free now."""
    return _remove(_named(store, _shard_names(store, shard_ids)))


def remove_model(store: ShardStore) -> int:
    """Removes all that belongs to a model, and its folder if nothing else is in it.

    Gives the bytes that are free now.  Raises StorageError (ours).
    """
    manifest = store.manifest()
    n_shards = len(manifest.shards) if manifest is not None else 0
    names = _shard_names(store, range(n_shards)) | {TOKENIZER_NAME}
    n_bytes = _remove(_named(store, names))
    for name in (MANIFEST_NAME, PUBLICATION_NAME, CHECKED_NAME):
        (store.directory / name).unlink(missing_ok=True)
    for folder in (TORRENTS_NAME, PARTIAL_NAME):
        shutil.rmtree(store.directory / folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # not empty: something else is in it
        store.directory.rmdir()
    return n_bytes


def _shard_names(store: ShardStore, shard_ids: Iterable[int]) -> set[str]:
    """Names of these shards, and of the adapters' parts for them."""
    manifest = store.manifest()
    n_adapters = len(manifest.adapters) if manifest is not None else 0
    ids = list(shard_ids)
    parts = {adapter_name(number, shard_id) for number in range(n_adapters) for shard_id in ids}
    return parts | {shard_name(shard_id) for shard_id in ids}


def _named(store: ShardStore, names: set[str]) -> list[Path]:
    """What there is of files with these names."""
    return [f for f in _files(store.directory) if f.name.removesuffix(ASIDE_SUFFIX) in names]


def _remove(paths: Iterable[Path]) -> int:
    n_bytes = 0
    for path in paths:
        n_bytes += disk_bytes(path)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{path} cannot be removed: {error.strerror}") from error
    return n_bytes


def folder_name(model_name: str, digest: str) -> str:
    """A folder's name: what is plain of the model's name, and the beginning of its digest."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", model_name).strip("-").lower()[:60]
    return f"{plain or 'model'}-{digest[:_DIGEST_CHARS]}"


def manifest_or_none(store: ShardStore) -> Manifest | None:
    """A folder's manifest, None if there is none or it is not good."""
    try:
        return store.manifest()
    except ShardmeshError:
        return None


def _files(folder: Path) -> list[Path]:
    """Model files of a folder: whole, unfinished and set aside."""
    if not folder.is_dir():
        return []
    found = [*folder.glob("*.gguf"), *(folder / PARTIAL_NAME).glob("*/*.gguf")]
    return [path for path in (*found, *set_aside_in(folder)) if path.is_file()]


def set_aside_in(folder: Path) -> list[Path]:
    """Files that were set aside in a folder, by name."""
    return sorted(folder.glob(f"*.gguf{ASIDE_SUFFIX}"))
