"""Files that become visible only when they are whole, and what the disk says against it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from shardmesh.errors import StorageError

TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under `path` when the block ends without an exception.

    Whatever stops the block, the temporary file is removed and `path` is as it was.  Raises
    OSError.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as file:
            yield file
            flush_to_disk(file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


def flush_to_disk(file: BinaryIO) -> None:
    """Waits until the disk has all that was written to an open file."""
    file.flush()
    os.fsync(file.fileno())


def flush_directory(directory: Path) -> None:
    """Waits until the disk has the names in a directory, so that a rename outlives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns what the disk says about a file or folder into StorageErrors (ours)."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} cannot be used: {error.strerror or error}",
            next_step="check the folder's permissions and the disk",
        ) from error
