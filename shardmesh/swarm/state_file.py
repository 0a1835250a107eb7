"""Small files of a node's own state: whole or not there at all, readable by their owner only."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shardmesh.errors import InputError, StorageError

_log = logging.getLogger(__name__)


def write_state(path: Path, data: bytes, *, replace: bool = True) -> bool:
    """Writes a file of mode 0600 in one step; makes the folder (mode 0700) if it is missing.

    Without `replace` a file that is already there stays; False says so.  Raises StorageError
    (ours); a failure or a cancellation leaves the old file, or none.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise _failed(path, error) from error
    temporary = Path(name)  # mkstemp has given it mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
            return True
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise _failed(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _failed(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path} cannot be written: {error.strerror or error}",
        next_step="Choose another folder with --state-dir, or free some space.",
    )


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a node's state folder, which is made if it is missing.

    Two nodes with one identity would take each other's place all the time.  Raises InputError
    (theirs) if the folder is in use, StorageError (ours) when the disk fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _failed(folder, error) from error
    with _locked(descriptor, folder, "--state-dir"):
        yield


@contextlib.contextmanager
def locked_file(path: Path, identity_file: Path) -> Iterator[None]:
    """Keeps other processes from using one identity for the same, for which this lock file stands.

    Raises InputError (theirs) if another one does.  Where the file cannot be made, as on a disk
    that is read only, nobody is kept out.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        _log.debug("%s is not locked: %s", identity_file, error)
        yield
        return
    with _locked(descriptor, identity_file, "--identity-file or --state-dir"):
        yield


@contextlib.contextmanager
def _locked(descriptor: int, path: Path, flags: str) -> Iterator[None]:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(
            f"another node uses {path}",
            code="STATE_IN_USE",
            next_step=f"stop it, or give this one its own {flags}",
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise _failed(path, error) from error
    try:
        yield
    finally:
        os.close(descriptor)  # which also ends the lock
