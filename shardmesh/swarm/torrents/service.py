"""A node's part in the exchange of model files: gives what it has, fetches what it is asked for."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from shardmesh.errors import carried_past, ungrouped
from shardmesh.shards.hashing import HashedFile
from shardmesh.shards.library import Library
from shardmesh.shards.partial import PartialFile
from shardmesh.shards.publication import OpenPublication, PublishedFile
from shardmesh.shards.room import make_room
from shardmesh.swarm.dht import Dht
from shardmesh.swarm.directory import Directory
from shardmesh.swarm.host import Host
from shardmesh.swarm.torrents.download import Download
from shardmesh.swarm.torrents.exchange import serve_torrents
from shardmesh.swarm.torrents.opening import open_torrents
from shardmesh.swarm.torrents.options import TorrentOptions
from shardmesh.swarm.torrents.progress import DownloadProgress, SeedingReport
from shardmesh.swarm.torrents.seeding import Seeder
from shardmesh.swarm.torrents.session import TorrentSession
from shardmesh.swarm.torrents.sources import Sources

logger = logging.getLogger("shardmesh")

BUSY_RATE_BYTES_PER_S: Final = 4_000_000
"""What is given and taken while the node computes: little of a core, and still some progress."""

_DONE_KEPT: Final = 16


class FileService:
    """What a node does with model files; made by `open_files`."""

    def __init__(
        self,
        host: Host,
        dht: Dht,
        directory: Directory,
        library: Library,
        torrents: TorrentSession,
        options: TorrentOptions,
        nursery: trio.Nursery,
    ) -> None:
        self._host = host
        self._dht = dht
        self._library = library
        self._torrents = torrents
        self._options = options
        self._nursery = nursery
        self._sources = Sources(host, dht, directory)
        self._downloads: dict[Path, Download] = {}
        self._seeder = Seeder(torrents, library, self._is_downloading)
        self._backs_off = False
        self.on_download: Callable[[], None] = lambda: None
        """Called when a download begins and when it is over."""
        serve_torrents(host, torrents, self._publication_of, self._sources.learn)

    # -- what can be seen ----------------------------------------------------------------------

    def downloads(self) -> list[DownloadProgress]:
        """Every download under way and the last ones that are over, oldest first."""
        return [download.progress() for download in self._downloads.values()]

    def seeding(self) -> SeedingReport:
        """What the node gives and takes now."""
        statuses = [torrent.status for torrent in self._torrents.all()]
        return SeedingReport(
            n_files=self._seeder.n_files,
            n_connections=sum(status.n_sources for status in statuses),
            upload_rate_bytes_per_s=sum(status.upload_rate_bytes_per_s for status in statuses),
            download_rate_bytes_per_s=sum(status.download_rate_bytes_per_s for status in statuses),
            n_bytes_uploaded=sum(status.n_bytes_uploaded for status in statuses),
            is_backing_off=self._backs_off,
        )

    def files(self) -> list[FileReport]:
        """Every GGUF file that is given or fetched; blocks on nothing."""
        found = [
            self._file_report(path.name, path.parent, hashed) for path, hashed in self._seeder.all()
        ]
        for path, download in self._downloads.items():
            if not download.done.is_set():
                found.append(self._unfinished_report(path, download))
        return found

    def _file_report(self, name: str, folder: Path, hashed: HashedFile) -> FileReport:
        torrent = self._torrents.get(hashed.torrent.info_hash())
        return FileReport(
            name=name,
            folder=folder.name,
            n_bytes=hashed.torrent.n_bytes,
            info_hash=hashed.torrent.info_hash().hex(),
            sha256=hashed.sha256,
            share_complete=1.0,
            upload_rate_bytes_per_s=torrent.status.upload_rate_bytes_per_s if torrent else 0,
            download_rate_bytes_per_s=0,
        )

    def _unfinished_report(self, path: Path, download: Download) -> FileReport:
        progress = download.progress()
        torrent = self._torrents.get(download.file.info_hash)
        return FileReport(
            name=path.name,
            folder=path.parent.name,
            n_bytes=download.file.n_bytes,
            info_hash=download.file.info_hash.hex(),
            sha256=download.file.sha256,
            share_complete=round(progress.n_bytes_done / progress.n_bytes_total, 4),
            upload_rate_bytes_per_s=torrent.status.upload_rate_bytes_per_s if torrent else 0,
            download_rate_bytes_per_s=progress.rate_bytes_per_s,
        )

    async def wait_given(self) -> None:
        """Waits until all files that were there at the start are hashed and given."""
        await self._seeder.scanned.wait()

    # -- fetching ------------------------------------------------------------------------------

    async def find_publication(
        self, manifest_digest: str, publisher: bytes | None = None
    ) -> OpenPublication | None:
        """The signed manifest with this digest: from the disk, or from a node that has it.

        With a `publisher`, only what that one has signed.  None if nobody has it at the moment.
        """
        for opened in await trio.to_thread.run_sync(self._library.publications):
            is_wanted = publisher in (None, opened.publisher)
            if is_wanted and opened.manifest.digest() == manifest_digest:
                return opened
        return await self._sources.find_publication(manifest_digest, publisher)

    async def fetch_all(
        self, opened: OpenPublication, files: Sequence[PublishedFile], folder: Path
    ) -> None:
        """Fetches files of a published model at once, if there is room for all of them.

        Raises the first error, and the errors of `fetch`.
        """
        wanted = {folder / file.name: PartialFile(folder, file) for file in files}
        under_way = [
            download.partial
            for path, download in self._downloads.items()
            if path not in wanted and not download.done.is_set()
        ]
        what = f"{len(wanted)} files of {opened.manifest.model_name}"
        await trio.to_thread.run_sync(self._make_room, what, folder, wanted.values(), under_way)
        with ungrouped():
            async with trio.open_nursery() as nursery:
                for file in files:
                    nursery.start_soon(self.fetch, opened, file, folder)

    async def fetch(self, opened: OpenPublication, file: PublishedFile, folder: Path) -> None:
        """Returns when the file of a published model lies whole and right in the folder.

        Who asks for the same file meanwhile waits for the same download, which goes on when the
        waiting is cancelled.  Raises InputError (NO_ROOM; BAD_SHARD if the publisher's info-hash
        and SHA-256 do not belong together), StorageError (ours).
        """
        path = folder / file.name
        download = self._downloads.get(path)
        if download is None or download.done.is_set():
            download = Download(
                file,
                folder,
                model_name=opened.manifest.model_name,
                manifest_digest=opened.manifest.digest(),
            )
            self._downloads.pop(path, None)
            self._downloads[path] = download
            self._forget_old()
            self._nursery.start_soon(self._run, download)
        await download.done.wait()
        if download.error is not None:
            raise download.error

    async def _run(self, download: Download) -> None:
        self.on_download()
        await self._seeder.release(download.file.info_hash)
        await download.run(self._host, self._torrents, self._sources, self._check_room)
        self._seeder.look_now()
        self.on_download()

    def _forget_old(self) -> None:
        over = [path for path, download in self._downloads.items() if download.done.is_set()]
        for path in over[:-_DONE_KEPT]:
            del self._downloads[path]

    def _is_downloading(self, info_hash: bytes) -> bool:
        return any(
            download.file.info_hash == info_hash and not download.done.is_set()
            for download in self._downloads.values()
        )

    def _check_room(self, partial: PartialFile) -> None:
        """For one file; what else is under way had its room checked before it began."""
        self._make_room(partial.final.name, partial.final.parent, [partial], [])

    def _make_room(
        self,
        what: str,
        folder: Path,
        wanted: Collection[PartialFile],
        under_way: Collection[PartialFile],
    ) -> None:
        make_room(
            what,
            sum(partial.n_bytes_missing() for partial in wanted),
            folder,
            self._library,
            max_bytes=self._options.max_disk_bytes,
            n_promised=sum(partial.n_bytes_missing() for partial in under_way),
        )

    # -- giving --------------------------------------------------------------------------------

    async def _publication_of(self, manifest_digest: str) -> bytes | None:
        for opened in await trio.to_thread.run_sync(self._library.publications):
            if opened.manifest.digest() == manifest_digest:
                return opened.signed
        return None

    def look_now(self) -> None:
        """Files were added or removed: give what is there now."""
        self._seeder.look_now()

    async def release(self, info_hash: bytes) -> None:
        """Stops giving a file."""
        await self._seeder.release(info_hash)

    async def cut_off(self, peer_ids: Collection[str]) -> None:
        """These nodes are no members any more: nothing is exchanged with them from now on."""
        await self._torrents.shut_out(peer_ids)

    def start(self) -> None:
        """From now on gives all files."""
        self._nursery.start_soon(self._seeder.run)
        self._nursery.start_soon(self._seeder.keep_registering, self._dht)

    def back_off(self, backs_off: bool) -> None:
        """Takes little of the machine from now on, while the node computes; or what it may."""
        if backs_off != self._backs_off:
            self._backs_off = backs_off
            rates = (
                self._options.upload_rate_bytes_per_s,
                self._options.download_rate_bytes_per_s,
            )
            upload, download = map(backed_off, rates) if backs_off else rates
            self._torrents.set_rates(
                upload_rate_bytes_per_s=upload, download_rate_bytes_per_s=download
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileReport:
    """One file as LIST_FILES tells of it; rates in bytes per second."""

    name: str
    folder: str
    n_bytes: int
    info_hash: str
    sha256: str
    share_complete: float
    upload_rate_bytes_per_s: int
    download_rate_bytes_per_s: int


def backed_off(rate: int) -> int:
    """The rate while the node computes; a limit that is lower anyway stays."""
    return min(rate, BUSY_RATE_BYTES_PER_S) if rate else BUSY_RATE_BYTES_PER_S


@asynccontextmanager
async def open_files(
    host: Host, dht: Dht, directory: Directory, library: Library, options: TorrentOptions
) -> AsyncIterator[FileService]:
    """A file service that answers and fetches until the block is left; `start` it to give as well.

    Raises InputError (theirs, PORT_TAKEN) if its port cannot be had.
    """
    with carried_past() as block:
        async with (
            open_torrents(
                listen_hosts=options.listen_hosts,
                port=options.port,
                upload_rate_bytes_per_s=options.upload_rate_bytes_per_s,
                download_rate_bytes_per_s=options.download_rate_bytes_per_s,
                members_only=not host.admission.is_public,
            ) as torrents,
            trio.open_nursery() as nursery,
        ):
            with block():
                yield FileService(host, dht, directory, library, torrents, options, nursery)
            nursery.cancel_scope.cancel()
