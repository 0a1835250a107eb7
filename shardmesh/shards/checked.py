"""Remembers which files were hashed, so that a restart does not read 40 GB again."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from shardmesh.errors import ProtocolError
from shardmesh.shards.atomic import atomic_file
from shardmesh.shards.hashing import HashedFile, hash_file
from shardmesh.wire.codec import decode_json, encode_json
from shardmesh.wire.limits import MANIFEST_BYTES_MAX, TORRENT_BYTES_MAX
from shardmesh.wire.torrent_file import decode_torrent

CHECKED_NAME: Final = ".checked.json"
TORRENTS_NAME: Final = ".torrents"


class CheckedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file as it was when its digest was taken."""

    n_bytes: int
    mtime_ns: int
    inode: int
    sha256: str
    info_hash: str = ""
    """Of the torrent that lies in the folder `.torrents`, in hex; empty if there is none."""


class _Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    files: dict[str, CheckedFile]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex, from memory if size, time and inode are those of last time.

    What was computed is remembered in the file's folder.  Raises OSError.
    """
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        known = _known(path, before)
        if known is not None:
            return known.sha256
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        after = os.fstat(file.fileno())
    if _same(before, after):
        _remember(path, after, sha256, info_hash="")
    return sha256


def hashes_of(path: Path) -> HashedFile:
    """SHA-256 and torrent of a file, remembered as in `sha256_of`; raises OSError, StorageError.

    One process at a time computes in a folder: of several nodes that share it, the others find
    what the first has remembered.
    """
    remembered = _remembered_hashes(path)
    if remembered is not None:
        return remembered
    with _hashing_alone(path.parent):
        remembered = _remembered_hashes(path)
        if remembered is not None:
            return remembered
        before = path.stat()
        hashed = hash_file(path)
        after = path.stat()
        if _same(before, after):
            remember_hashes(path, hashed)
        return hashed


def remember_hashes(path: Path, hashed: HashedFile) -> None:
    """Notes what the file, as it is now, was found to be."""
    torrent_path = _torrent_path(path)
    try:
        torrent_path.parent.mkdir(exist_ok=True)
        with atomic_file(torrent_path) as file:
            file.write(hashed.torrent.encode())
    except OSError:
        return  # read-only or full: it is computed again next time
    _remember(path, path.stat(), hashed.sha256, info_hash=hashed.torrent.info_hash().hex())


def _remembered_hashes(path: Path) -> HashedFile | None:
    known = _known(path, path.stat())
    if known is None or not known.info_hash:
        return None
    try:
        with _torrent_path(path).open("rb") as file:
            torrent = decode_torrent(file.read(TORRENT_BYTES_MAX + 1))
    except (OSError, ProtocolError):
        return None
    is_right = torrent.name == path.name and torrent.info_hash().hex() == known.info_hash
    return HashedFile(known.sha256, torrent) if is_right else None


def _torrent_path(path: Path) -> Path:
    return path.with_name(TORRENTS_NAME) / f"{path.name}.torrent"


def _known(path: Path, status: os.stat_result) -> CheckedFile | None:
    known = _read_memory(path.with_name(CHECKED_NAME)).get(path.name)
    if known is None or known != _described(status, known.sha256, known.info_hash):
        return None
    return known


def _remember(path: Path, status: os.stat_result, sha256: str, info_hash: str) -> None:
    memory_path = path.with_name(CHECKED_NAME)
    files = _read_memory(memory_path)
    _write_memory(memory_path, {**files, path.name: _described(status, sha256, info_hash)})


def _described(status: os.stat_result, sha256: str, info_hash: str) -> CheckedFile:
    return CheckedFile(
        n_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        inode=status.st_ino,
        sha256=sha256,
        info_hash=info_hash,
    )


def _same(before: os.stat_result, after: os.stat_result) -> bool:
    """Whether nobody wrote between the two."""
    return _described(before, "", "") == _described(after, "", "")


@contextlib.contextmanager
def _hashing_alone(folder: Path) -> Iterator[None]:
    """Waits until no other process hashes files of the folder; a read-only one has no lock."""
    try:
        (folder / TORRENTS_NAME).mkdir(exist_ok=True)
        lock = (folder / TORRENTS_NAME / ".lock").open("wb")
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the file
        yield


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
