"""One download: from whoever has pieces, checked, to its final name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from shardmesh.errors import InputError, OurError, ShardmeshError, ungrouped
from shardmesh.shards.partial import PartialFile
from shardmesh.shards.publication import PublishedFile
from shardmesh.swarm.host import Host
from shardmesh.swarm.torrents.exchange import Source, connect_with, take_in
from shardmesh.swarm.torrents.progress import (
    PROGRESS_LOGGER,
    DownloadProgress,
    DownloadState,
    eta_s,
    readable_progress,
    readable_size,
)
from shardmesh.swarm.torrents.session import Torrent, TorrentSession
from shardmesh.swarm.torrents.sources import Sources
from shardmesh.wire.limits import TORRENT_ASK_INTERVAL_MAX_S
from shardmesh.wire.torrent_file import TorrentFile

logger = logging.getLogger("shardmesh")
_progress_logger = logging.getLogger(PROGRESS_LOGGER)

_ASK_INTERVAL_MIN_S: Final = 1.0
_REPORT_INTERVAL_S: Final = 5.0
_FLUSH_INTERVAL_S: Final = 1.0
_WAIT_INTERVAL_S: Final = 0.5
_LOOKING_REPORT_INTERVAL_S: Final = 30.0
_LOOKING_PATIENCE_S: Final = 4.0  # a node that has just started has to find the others first

CheckRoom = Callable[[PartialFile], None]
"""Raises InputError (NO_ROOM) if the node may not or cannot keep so much; blocks on the disk."""


class Download:
    """The fetching of one file; `run` it once, ask for `progress` at any time."""

    def __init__(
        self, file: PublishedFile, folder: Path, *, model_name: str, manifest_digest: str
    ) -> None:
        self.file = file
        self.done = trio.Event()
        self.error: ShardmeshError | None = None
        self._state: DownloadState = "checking"
        self._model_name = model_name
        self._manifest_digest = manifest_digest
        self.partial = PartialFile(folder, file)
        self._torrent: Torrent | None = None
        self._found: dict[str, Source] = {}

    def progress(self) -> DownloadProgress:
        """How far it is now."""
        status = self._torrent.status if self._torrent is not None else None
        n_total = self.file.n_bytes
        n_done = n_total if self._state in ("verifying", "done") else 0
        rate = n_sources = 0
        state = self._state
        if status is not None and state == "downloading":
            n_done, n_sources = status.n_bytes_done, status.n_sources
            rate = status.download_rate_bytes_per_s
            if status.is_checking:
                state = "checking"
            elif not n_sources:
                state = "looking"
        return DownloadProgress(
            model_name=self._model_name,
            file_name=self.file.name,
            state=state,
            n_bytes_done=n_done,
            n_bytes_total=n_total,
            rate_bytes_per_s=rate,
            eta_s=eta_s(n_total - n_done, rate),
            n_sources=n_sources,
            error=str(self.error) if self.error else "",
        )

    async def run(
        self, host: Host, torrents: TorrentSession, sources: Sources, check_room: CheckRoom
    ) -> None:
        """Fetches until the file is there or cannot be had; then `done` is set, with `error`.

        A cancellation leaves what was fetched, for the next start.
        """
        try:
            while not await self._attempt(host, torrents, sources, check_room):
                self._state = "waiting"
                await trio.sleep(_WAIT_INTERVAL_S)
            self._state = "done"
        except ShardmeshError as error:
            self._fail(error)
        except trio.Cancelled:
            self._fail(OurError("the node is leaving"))
            raise
        except Exception:
            logger.exception("[TORRENT] ✗ The download of %s failed", self.file.name)
            self._fail(OurError("the download failed", next_step="Look into the log."))
        finally:
            self.done.set()

    def _fail(self, error: ShardmeshError) -> None:
        self.error = error
        self._state = "failed"

    async def _attempt(
        self, host: Host, torrents: TorrentSession, sources: Sources, check_room: CheckRoom
    ) -> bool:
        """Whether the file is there now; False while another process fetches it."""
        if await trio.to_thread.run_sync(self.partial.is_final_right):
            await trio.to_thread.run_sync(self.partial.discard_leftover)
            return True
        with self.partial.locked() as is_ours:
            if not is_ours:
                return False
            if await trio.to_thread.run_sync(self.partial.is_final_right):
                await trio.to_thread.run_sync(self.partial.discard)
                return True  # it came in between
            await torrents.remove(self.file.info_hash)  # a damaged file may be given at present
            await trio.to_thread.run_sync(self.partial.take_back)
            try:
                await trio.to_thread.run_sync(check_room, self.partial)
                await self._fetch(host, torrents, sources)
            except BaseException as error:
                with trio.CancelScope(shield=True):
                    await torrents.remove(self.file.info_hash)
                    await trio.to_thread.run_sync(self._keep_or_discard, error)
                raise
        return True

    def _keep_or_discard(self, error: BaseException) -> None:
        """Keeps pieces for the next attempt, unless they are not what the publisher says."""
        is_wrong = isinstance(error, InputError) and error.code != "NO_ROOM"
        if is_wrong or not self.partial.is_begun():
            self.partial.discard()

    async def _fetch(self, host: Host, torrents: TorrentSession, sources: Sources) -> None:
        with ungrouped():
            found = await self._fetch_grouped(host, torrents, sources)
        self._state = "verifying"
        await trio.to_thread.run_sync(self.partial.publish, found)
        if self._torrent is not None:
            torrents.moved(self._torrent, self.partial.final.parent)
        logger.info("[TORRENT] ✓ %s is here, whole and right", self.file.name)

    async def _fetch_grouped(
        self, host: Host, torrents: TorrentSession, sources: Sources
    ) -> TorrentFile:
        async with trio.open_nursery() as nursery:
            found = await self._find_torrent(torrents, sources)
            known = [e for source in self._found.values() for e in take_in(host, torrents, source)]
            self._torrent = await torrents.add(
                found, self.partial.folder, is_whole=False, sources=known
            )
            self._state = "downloading"
            _progress_logger.info(
                "[TORRENT] ↓ Fetching %s of %s, %s",
                self.file.name,
                self._model_name,
                readable_size(self.file.n_bytes),
            )
            nursery.start_soon(self._keep_connecting, host, torrents, sources)
            nursery.start_soon(self._keep_reporting)
            nursery.start_soon(self._keep_flushing, torrents, self._torrent)
            await self._complete(torrents, self._torrent)
            nursery.cancel_scope.cancel()
        return found

    async def _find_torrent(self, torrents: TorrentSession, sources: Sources) -> TorrentFile:
        """The torrent of an earlier start, or from the first node that has it; asks for ever."""
        kept = await trio.to_thread.run_sync(self.partial.torrent)
        if kept is not None:
            return kept
        self._state = "looking"
        pause_s = _ASK_INTERVAL_MIN_S
        reported_s = trio.current_time() - _LOOKING_REPORT_INTERVAL_S + _LOOKING_PATIENCE_S
        while True:
            found: list[TorrentFile] = []

            def take(source: Source, found: list[TorrentFile] = found) -> None:
                torrent = source.torrent
                if torrent is not None and torrent.n_bytes == self.file.n_bytes:
                    found.append(torrent)
                self._found[source.peer_id] = source

            await self._ask(torrents, sources, wants_torrent=True, on_source=take)
            if found:
                await trio.to_thread.run_sync(self.partial.keep_torrent, found[0])
                return found[0]
            if trio.current_time() - reported_s >= _LOOKING_REPORT_INTERVAL_S:
                reported_s = trio.current_time()
                logger.warning(
                    "[TORRENT] No node has %s of %s yet; looking on",
                    self.file.name,
                    self._model_name,
                )
            await trio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, TORRENT_ASK_INTERVAL_MAX_S)

    async def _ask(
        self,
        torrents: TorrentSession,
        sources: Sources,
        *,
        wants_torrent: bool,
        on_source: Callable[[Source], None],
    ) -> None:
        await sources.find_file(
            self.file.info_hash,
            manifest_digest=self._manifest_digest,
            wants_torrent=wants_torrent,
            port=torrents.port,
            on_source=on_source,
        )

    async def _keep_connecting(
        self, host: Host, torrents: TorrentSession, sources: Sources
    ) -> None:
        """Connects with all that have pieces, those that come later too."""

        def connect(source: Source) -> None:
            connect_with(host, torrents, self.file.info_hash, source)

        pause_s = _ASK_INTERVAL_MIN_S
        while True:
            await self._ask(torrents, sources, wants_torrent=False, on_source=connect)
            await trio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, TORRENT_ASK_INTERVAL_MAX_S)

    async def _keep_flushing(self, torrents: TorrentSession, torrent: Torrent) -> None:
        """So that no more than some seconds are lost when the process is killed."""
        while True:
            await trio.sleep(_FLUSH_INTERVAL_S)
            torrents.begin_flush(torrent)

    async def _keep_reporting(self) -> None:
        while True:
            await trio.sleep(_REPORT_INTERVAL_S)
            _progress_logger.info("[TORRENT] ↓ %s", readable_progress(self.progress()))

    async def _complete(self, torrents: TorrentSession, torrent: Torrent) -> None:
        """Waits until the partial file is whole; what the disk has spoiled is fetched once more."""
        for attempt in range(2):
            await torrent.finished.wait()
            torrent.raise_error()
            self._state = "verifying"
            await torrents.flush(torrent)
            if await trio.to_thread.run_sync(self.partial.is_right):
                return
            if attempt == 0:
                logger.warning("[TORRENT] %s is checked piece by piece again", self.file.name)
                self._state = "downloading"
                await torrents.recheck(torrent)
        raise InputError(
            f"{self.file.name} has the publisher's info-hash, but not the manifest's SHA-256",
            code="BAD_SHARD",
            next_step="the publisher has to publish the model again",
        )
