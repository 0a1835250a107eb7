"""Room for files: what the disk has free, and what the models of a node may take."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Final

from shardmesh.errors import InputError
from shardmesh.shards.atomic import storage_errors
from shardmesh.shards.library import Library
from shardmesh.shards.partial import disk_bytes

ROOM_TO_SPARE_BYTES: Final = 16 * 1024 * 1024
"""Free space left to others: folders, manifests, what they write meanwhile."""
BESIDE_THE_SPARE: Final = f"beside the {ROOM_TO_SPARE_BYTES // 2**20} MiB that are left to others"

_log = logging.getLogger(__name__)


def n_bytes_free(folder: Path) -> int:
    """Bytes that the disk of a folder, which may be missing yet, has for us.  Raises OSError."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return max(0, shutil.disk_usage(existing).free - ROOM_TO_SPARE_BYTES)


def make_room(
    what: str, n_bytes: int, folder: Path, library: Library, *, max_bytes: int, n_promised: int = 0
) -> None:
    """Returns if there is room for so many more bytes in the folder, beside those `n_promised`.

    All of the library may take `max_bytes`, 0 for no limit.  The oldest files that were set aside
    are removed, if that makes room.  Blocks on the disk.  Raises InputError (theirs, NO_ROOM) and
    then has removed nothing, StorageError (ours).
    """
    with storage_errors(folder):
        n_free = max(0, n_bytes_free(folder) - n_promised)
        n_allowed = max(0, max_bytes - library.n_bytes() - n_promised) if max_bytes else n_free
        n_lacking = n_bytes - min(n_free, n_allowed)
        if n_lacking <= 0:
            return
        disk = folder.stat().st_dev
        aside = [path for path in library.set_aside() if path.stat().st_dev == disk]
        if sum(map(disk_bytes, aside)) >= n_lacking:
            _remove_oldest(aside, n_lacking)
        elif n_bytes > n_free:
            raise no_room(
                f"there is no room for {what}: {n_bytes:,} bytes are needed, {n_free:,} are free"
                f" {BESIDE_THE_SPARE}"
            )
        else:
            raise no_room(
                f"there is no room for {what}: {n_bytes:,} bytes are needed, --max-disk of "
                f"{max_bytes:,} bytes leaves {n_allowed:,}"
            )


def _remove_oldest(paths: list[Path], n_bytes: int) -> None:
    """Removes files in this order until so many bytes are free."""
    for path in paths:
        if n_bytes <= 0:
            break
        n_bytes -= disk_bytes(path)
        path.unlink(missing_ok=True)
        _log.warning("%s, which was set aside, is removed to make room", path)


def no_room(sentence: str) -> InputError:
    """The error for a disk or a limit that has no room for a file."""
    return InputError(
        sentence,
        code="NO_ROOM",
        next_step="free some space with `shardmesh rm`, or give a larger --max-disk",
    )
