"""Remembers which files were hashed, so that a restart does not read 40 GB again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Final

import msgspec

from shardmesh.errors import ProtocolError
from shardmesh.shards.atomic import atomic_file
from shardmesh.wire.codec import decode_json, encode_json
from shardmesh.wire.limits import MANIFEST_BYTES_MAX

CHECKED_NAME: Final = ".checked.json"


class CheckedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file as it was when its digest was taken."""

    n_bytes: int
    mtime_ns: int
    inode: int
    sha256: str


class _Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    files: dict[str, CheckedFile]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex, from memory if size, time and inode are those of last time.

    What was computed is remembered in the file's folder.  Raises OSError.
    """
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        memory_path = path.with_name(CHECKED_NAME)
        files = _read_memory(memory_path)
        known = files.get(path.name)
        if known is not None and known == _described(before, known.sha256):
            return known.sha256
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        after = os.fstat(file.fileno())
    if _described(before, sha256) == _described(after, sha256):  # nobody wrote meanwhile
        _write_memory(memory_path, {**files, path.name: _described(after, sha256)})
    return sha256


def _described(status: os.stat_result, sha256: str) -> CheckedFile:
    return CheckedFile(
        n_bytes=status.st_size, mtime_ns=status.st_mtime_ns, inode=status.st_ino, sha256=sha256
    )


def _read_memory(path: Path) -> dict[str, CheckedFile]:
    """What is remembered; a file that cannot be understood only means hashing again."""
    try:
        with path.open("rb") as file:
            return decode_json(file.read(MANIFEST_BYTES_MAX), _Memory).files
    except (FileNotFoundError, ProtocolError):
        return {}


def _write_memory(path: Path, files: dict[str, CheckedFile]) -> None:
    there = {name: known for name, known in files.items() if path.with_name(name).exists()}
    try:
        with atomic_file(path) as file:
            file.write(encode_json(_Memory(files=there)))
    except OSError:
        return  # read-only or full: the digest is right all the same, and taken again next time
