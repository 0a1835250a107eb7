"""A hidden folder in which files grow until all are whole and get their names together."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from shardmesh.errors import InputError
from shardmesh.shards.atomic import flush_directory

STAGING_NAME: Final = ".split-in-progress"
_LOCK_NAME: Final = ".split-lock"


@contextlib.contextmanager
def staging_folder(out_dir: Path) -> Iterator[Path]:
    """An empty folder inside `out_dir`, which is made if it is missing.

    Whatever ends the block, the staging folder is gone afterwards, and so is every folder that was
    made for it and is still empty.  What an earlier, broken-off block left is removed first.
    Raises InputError (theirs) while another process has the folder, and OSError.
    """
    made = [folder for folder in (out_dir, *out_dir.parents) if not folder.exists()]
    out_dir.mkdir(parents=True, exist_ok=True)
    staging = out_dir / STAGING_NAME
    try:
        with _locked(out_dir):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            try:
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # not empty: it holds what was made
                folder.rmdir()


def publish(staging: Path, out_dir: Path, names: Sequence[str]) -> None:
    """Moves whole files to their final names, in order.

    When that fails half-way, those already moved are removed.  Raises OSError.
    """
    moved: list[Path] = []
    try:
        for name in names:
            target = out_dir / name
            (staging / name).replace(target)
            moved.append(target)
        flush_directory(out_dir)
    except BaseException:
        for target in moved:
            target.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _locked(out_dir: Path) -> Iterator[None]:
    """Keeps other splits out of a folder; the lock ends with the process at the latest."""
    lock_path = out_dir / _LOCK_NAME
    with lock_path.open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another split is writing to {out_dir}",
                code="SPLIT_RUNNING",
                next_step="wait for it to end, or give another folder with --out",
            ) from error
        try:
            yield
        finally:
            lock_path.unlink(missing_ok=True)
