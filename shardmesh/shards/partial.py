"""Where a file grows until it is whole: a hidden folder of its own, named by its info-hash.

Only one process at a time may write there, and only a file whose SHA-256 was found right leaves it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from shardmesh.errors import ProtocolError
from shardmesh.shards.atomic import atomic_file, flush_directory, storage_errors
from shardmesh.shards.checked import remember_hashes, sha256_of
from shardmesh.shards.hashing import HashedFile
from shardmesh.shards.publication import PublishedFile
from shardmesh.wire.limits import TORRENT_BYTES_MAX
from shardmesh.wire.torrent_file import TorrentFile, decode_torrent

PARTIAL_NAME: Final = ".partial"
ASIDE_SUFFIX: Final = ".set-aside"


class PartialFile:
    """A file of a model folder that is being fetched.  All methods block on the disk.

    Each raises StorageError (ours) when the disk fails.
    """

    def __init__(self, folder: Path, file: PublishedFile) -> None:
        self.final = folder / file.name
        self.folder = folder / PARTIAL_NAME / file.info_hash.hex()
        self.path = self.folder / file.name
        self._file = file

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Makes the folder and keeps other processes out; False while another one is in."""
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("wb")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield self._is_still_there(lock.fileno())

    def _is_still_there(self, lock: int) -> bool:
        """Whoever was in before may have removed the folder with the lock that is held now."""
        try:
            return (self.folder / ".lock").stat().st_ino == os.fstat(lock).st_ino
        except FileNotFoundError:
            return False

    def is_final_right(self) -> bool:
        """Whether the whole file is there under its final name."""
        with storage_errors(self.final):
            try:
                has_size = self.final.stat().st_size == self._file.n_bytes
            except FileNotFoundError:
                return False
            return has_size and sha256_of(self.final) == self._file.sha256

    def take_back(self) -> None:
        """Takes a wrong file from the final name, to mend it, or aside if it cannot be this one."""
        with storage_errors(self.final):
            try:
                n_bytes = self.final.stat().st_size
            except FileNotFoundError:
                return
            if n_bytes == self._file.n_bytes and not self.path.exists():
                self.final.replace(self.path)
            else:
                self.final.replace(self.final.with_name(self.final.name + ASIDE_SUFFIX))

    def is_begun(self) -> bool:
        """Whether something is here that the next start can go on from."""
        return (self.folder / ".torrent").exists() or self.path.exists()

    def n_bytes_missing(self) -> int:
        """Bytes that the disk still has to find room for; what is there is not read."""
        with storage_errors(self.folder):
            if self.final.exists() and self.final.stat().st_size == self._file.n_bytes:
                return 0  # if it is wrong it is mended where it lies
            n_here = disk_bytes(self.path) + disk_bytes(self.final)  # a wrong one can go for it
            return max(0, self._file.n_bytes - n_here)

    def torrent(self) -> TorrentFile | None:
        """The torrent of an earlier start, if it is still the right one."""
        try:
            with (self.folder / ".torrent").open("rb") as file:
                torrent = decode_torrent(file.read(TORRENT_BYTES_MAX + 1))
        except (OSError, ProtocolError):
            return None
        return torrent if torrent.info_hash() == self._file.info_hash else None

    def keep_torrent(self, torrent: TorrentFile) -> None:
        """Keeps the torrent, so that a later start needs nobody to ask."""
        with storage_errors(self.folder), atomic_file(self.folder / ".torrent") as file:
            file.write(torrent.encode())

    def is_right(self) -> bool:
        """Whether the fetched file has the size and the SHA-256 of the manifest; reads it all."""
        with storage_errors(self.path):
            return (
                self.path.stat().st_size == self._file.n_bytes
                and sha256_of(self.path) == self._file.sha256
            )

    def publish(self, torrent: TorrentFile) -> None:
        """Gives the file, which `is_right`, its final name; what was there is set aside."""
        with storage_errors(self.final):
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
            if self.final.exists() and not self.is_final_right():
                self.final.replace(self.final.with_name(self.final.name + ASIDE_SUFFIX))
            self.path.replace(self.final)
            flush_directory(self.final.parent)
            remember_hashes(self.final, HashedFile(self._file.sha256, torrent))
            self.discard()

    def discard_leftover(self) -> None:
        """Frees what is left of a fetch whose file came another way, unless somebody is in."""
        if self.folder.exists():
            with self.locked() as is_ours:
                if is_ours:
                    self.discard()

    def discard(self) -> None:
        """Frees all room that the unfinished file takes."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: another file is being fetched
            self.folder.parent.rmdir()


def disk_bytes(path: Path) -> int:
    """What a file really takes: one that is being fetched has holes."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
