"""Giving away all GGUF files that the node has, of all models, and telling the DHT of them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from shardmesh.errors import ShardmeshError
from shardmesh.shards.checked import hashes_of
from shardmesh.shards.hashing import HashedFile
from shardmesh.shards.library import Library
from shardmesh.shards.partial import PartialFile
from shardmesh.shards.publication import PublishedFile
from shardmesh.swarm.dht import Dht
from shardmesh.swarm.torrents.session import TorrentSession
from shardmesh.swarm.torrents.sources import file_key, model_key
from shardmesh.wire.limits import TORRENT_FILE_BYTES_MAX, TORRENT_SEEDED_FILES_MAX
from shardmesh.wire.torrent_file import is_file_name

logger = logging.getLogger("shardmesh")

SCAN_INTERVAL_S: Final = 10.0
_PROVIDE_PAUSE_S: Final = 1.2  # py-libp2p's nodes drop what comes faster than 10 in 10 s
_RETRY_PAUSES_S: Final = (1.0, 2.0, 5.0, 10.0, 30.0)


@dataclasses.dataclass(frozen=True)
class _Version:
    """A file as it was when it was hashed."""

    n_bytes: int
    mtime_ns: int
    inode: int


class Seeder:
    """The files that are given; looks at the disk anew now and then, and when told to."""

    def __init__(
        self,
        torrents: TorrentSession,
        library: Library,
        is_downloading: Callable[[bytes], bool],
    ) -> None:
        self._torrents = torrents
        self._library = library
        self._is_downloading = is_downloading
        self._seeded: dict[Path, tuple[_Version, HashedFile]] = {}
        self._refused: set[tuple[Path, _Version]] = set()
        self._kicked = trio.Event()
        self._keys: dict[str, str] = {}  # DHT key -> what to say once it is registered
        self._registered: set[str] = set()
        self._has_keys = trio.Event()
        self.scanned = trio.Event()
        """Set once all files that were there at the start are given."""

    @property
    def n_files(self) -> int:
        return len(self._seeded)

    def all(self) -> list[tuple[Path, HashedFile]]:
        """Every file that is given, by path."""
        return [(path, self._seeded[path][1]) for path in sorted(self._seeded)]

    def look_now(self) -> None:
        """Something changed on the disk."""
        self._kicked.set()

    async def release(self, info_hash: bytes) -> None:
        """Stops giving a file, which may be about to be mended or removed."""
        for path, (_, hashed) in list(self._seeded.items()):
            if hashed.torrent.info_hash() == info_hash:
                del self._seeded[path]
        await self._torrents.remove(info_hash)

    async def run(self) -> None:
        """Gives what there is, for ever."""
        while True:
            self._kicked = trio.Event()
            try:
                await self._look()
            except ShardmeshError as error:
                logger.warning("[TORRENT] ✗ %s", error)
            self.scanned.set()
            with trio.move_on_after(SCAN_INTERVAL_S):
                await self._kicked.wait()

    async def _look(self) -> None:
        there = await trio.to_thread.run_sync(self._files_there)
        for path, (version, hashed) in list(self._seeded.items()):
            info_hash = hashed.torrent.info_hash()
            torrent = self._torrents.get(info_hash)
            has_failed = torrent is not None and torrent.error is not None
            if there.get(path) != version or has_failed:  # the disk may have been gone for a while
                self._seeded.pop(path, None)
                if not self._is_downloading(info_hash):
                    await self.release(info_hash)  # another model may have it too: given anew below
        for digest in await trio.to_thread.run_sync(self._models_there):
            self._register(model_key(digest), "")
        for path, version in there.items():
            if path not in self._seeded and (path, version) not in self._refused:
                await self._give(path, version)

    def _files_there(self) -> dict[Path, _Version]:
        there: dict[Path, _Version] = {}
        for store in self._library.stores():
            for file in store.scan():
                path = store.directory / file.name
                if len(there) < TORRENT_SEEDED_FILES_MAX and is_file_name(file.name):
                    try:
                        status = path.stat()
                    except FileNotFoundError:
                        continue
                    if 0 < status.st_size <= TORRENT_FILE_BYTES_MAX:
                        there[path] = _Version(status.st_size, status.st_mtime_ns, status.st_ino)
        return there

    def _models_there(self) -> list[str]:
        return [opened.manifest.digest() for opened in self._library.publications()]

    async def _give(self, path: Path, version: _Version) -> None:
        """Hashes a file, unless it was before, and takes part with it."""
        try:
            hashed = await trio.to_thread.run_sync(  # minutes, for a large model
                hashes_of,
                path,
                abandon_on_cancel=True,  # type: ignore[call-arg]
            )
            info_hash = hashed.torrent.info_hash()
            if self._is_downloading(info_hash):
                return
            if self._torrents.get(info_hash) is None:
                await self._torrents.add(hashed.torrent, path.parent, is_whole=True)
        except FileNotFoundError:
            return  # removed, or taken back to be mended
        except (ShardmeshError, OSError) as error:
            logger.warning("[TORRENT] ✗ %s is not given to others: %s", path, error)
            self._refused.add((path, version))
            return
        self._seeded[path] = (version, hashed)
        self._register(file_key(info_hash), path.name)
        begun = PartialFile(
            path.parent,
            PublishedFile(
                name=path.name,
                n_bytes=version.n_bytes,
                sha256=hashed.sha256,
                info_hash=info_hash,
            ),
        )
        await trio.to_thread.run_sync(begun.discard_leftover)

    # -- the DHT -------------------------------------------------------------------------------

    def _register(self, key: str, name: str) -> None:
        if key not in self._registered and key not in self._keys:
            self._keys[key] = name
            self._has_keys.set()

    async def keep_registering(self, dht: Dht) -> None:
        """Tells the DHT who has what, one thing after the other, for ever.

        The library itself renews what it was told once.
        """
        n_failures = 0
        while True:
            if not self._keys:
                self._has_keys = trio.Event()
                await self._has_keys.wait()
            key, name = next(iter(self._keys.items()))
            try:
                await dht.provide(key)
            except ShardmeshError as error:
                logger.debug("[DHT] %s not registered: %s", key, error)
                await trio.sleep(_RETRY_PAUSES_S[min(n_failures, len(_RETRY_PAUSES_S) - 1)])
                n_failures += 1
                continue
            n_failures = 0
            del self._keys[key]
            self._registered.add(key)
            if name:
                logger.info("[TORRENT] ✓ Registered torrent file in DHT: %s", name)
            await trio.sleep(_PROVIDE_PAUSE_S)
