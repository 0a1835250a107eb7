"""libtorrent behind trio: torrents are added, connected and watched without blocking the loop."""

from __future__ import annotations

import dataclasses
import errno
import logging
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import libtorrent as lt
import trio

from shardmesh.errors import OurError, ShardmeshError, StorageError
from shardmesh.shards.room import no_room
from shardmesh.swarm.torrents.gate import Gate
from shardmesh.swarm.torrents.progress import RateMeter
from shardmesh.swarm.torrents.settings import (
    REST_TICK_MS,
    TICK_MS,
    let_in,
)
from shardmesh.wire.limits import TORRENT_SOURCES_MAX
from shardmesh.wire.torrent_file import TorrentFile

_log = logging.getLogger(__name__)

_UPDATE_INTERVAL_S: Final = 0.5
_REST_INTERVAL_S: Final = 5.0
"""The same while nothing has stirred for so long: nobody fetches, nobody is connected."""

_ADD_TIMEOUT_S: Final = 30.0
_FLUSH_TIMEOUT_S: Final = 60.0
_PEER_FLAGS: Final = (
    lt.torrent_flags.update_subscribe
    | lt.torrent_flags.apply_ip_filter
    | lt.torrent_flags.disable_dht
    | lt.torrent_flags.disable_lsd
    | lt.torrent_flags.disable_pex
    | lt.torrent_flags.duplicate_is_error
)

Endpoint = tuple[str, int]
"""An IP address and a port."""


@dataclasses.dataclass(frozen=True)
class TorrentStatus:
    """How far one torrent is; rates in bytes per second of payload."""

    n_bytes_done: int = 0
    download_rate_bytes_per_s: int = 0
    upload_rate_bytes_per_s: int = 0
    n_sources: int = 0
    is_checking: bool = False
    n_bytes_uploaded: int = 0


class Torrent:
    """One torrent in the session; made by `TorrentSession.add`."""

    def __init__(self, file: TorrentFile) -> None:
        self.file = file
        self.status = TorrentStatus()
        self.finished = trio.Event()
        """Set when every piece is there and right, or when it failed."""
        self.error: ShardmeshError | None = None
        self.n_bytes_refused = 0
        """Bytes that did not have their hash: a source sends rubbish, or the disk is damaged."""
        self._added = trio.Event()
        self._is_leaving = False
        self._removed = trio.Event()
        self._flushed = trio.Event()
        self._handle: lt.torrent_handle | None = None
        self._down = RateMeter()
        self._up = RateMeter()

    def fail(self, error: ShardmeshError) -> None:
        self.error = error
        for event in (self._added, self.finished, self._flushed):
            event.set()

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error


class TorrentSession:
    """libtorrent's session; made by `opening.open_torrents`.  All methods return quickly."""

    def __init__(self, session: lt.session, port: int, gate: Gate | None) -> None:
        self.port = port
        self._session: lt.session = session
        self._torrents: dict[bytes, Torrent] = {}
        self._gate = gate
        self._let_in: frozenset[str] | None = None
        self._stirred_s = time.monotonic()
        self._stirred = trio.Event()
        self._listening = trio.CancelScope(shield=True)
        self._apply_gate()

    def admit(self, peer_id: str, hosts: Collection[str]) -> None:
        """Lets a member connect for a while from its addresses; from all if it has none."""
        if self._gate is not None:
            self._gate.note(peer_id, hosts, time.monotonic())
            self._apply_gate()

    async def shut_out(self, peer_ids: Collection[str]) -> None:
        """These are no members any more; their connections end, unless a member shares them."""
        if self._gate is not None:
            self._gate.forget(peer_ids)
            self._apply_gate()
        await trio.lowlevel.checkpoint()

    def _apply_gate(self) -> None:
        hosts = None if self._gate is None else self._gate.hosts(time.monotonic())
        if hosts != self._let_in:
            self._let_in = hosts
            let_in(self._session, hosts)

    def get(self, info_hash: bytes) -> Torrent | None:
        """The torrent of this info-hash, if the session has it."""
        return self._torrents.get(info_hash)

    def all(self) -> list[Torrent]:
        return list(self._torrents.values())

    async def add(
        self,
        file: TorrentFile,
        folder: Path,
        *,
        is_whole: bool,
        sources: Sequence[Endpoint] = (),
    ) -> Torrent:
        """Takes part with the file of that name in `folder`.

        One that `is_whole` was just hashed and is only given, never written.  Another one is
        checked, as far as there, and completed; from the `sources` that are known already, at once.
        Raises OurError or StorageError (ours).  After a cancellation the torrent is in the session,
        or soon; `remove` it.
        """
        info_hash = file.info_hash()
        before = self._torrents.get(info_hash)
        if before is not None and before._is_leaving:
            await self.remove(info_hash)
        if info_hash in self._torrents:
            raise OurError(f"{file.name} is in the session twice")
        params = lt.load_torrent_buffer(file.encode())
        params.save_path = str(folder)
        params.flags = _PEER_FLAGS
        params.max_connections = TORRENT_SOURCES_MAX
        if is_whole:
            params.flags |= lt.torrent_flags.seed_mode | lt.torrent_flags.upload_mode
        if sources:
            params.flags |= lt.torrent_flags.paused
        torrent = self._torrents[info_hash] = Torrent(file)
        self._session.async_add_torrent(params)
        with trio.move_on_after(_ADD_TIMEOUT_S):
            await torrent._added.wait()
        if torrent._handle is None and torrent.error is None:
            torrent.fail(OurError(f"libtorrent did not take {file.name} in time"))
            self._leave(torrent)
        torrent.raise_error()
        if sources:
            self._begin_with(torrent, sources)
        return torrent

    def _begin_with(self, torrent: Torrent, sources: Sequence[Endpoint]) -> None:
        """Dials now: libtorrent does so when it resumes a torrent, otherwise once a second."""
        for host, port in sources:
            self.connect(torrent, host, port)
        if torrent._handle is not None:
            torrent._handle.resume()

    def connect(self, torrent: Torrent, host: str, port: int) -> None:
        """Connects with a node that is said to have pieces; nothing happens if it is known."""
        if torrent._handle is not None and port:
            try:
                torrent._handle.connect_peer((host, port))
                self._stir()
            except (RuntimeError, ValueError) as error:
                _log.debug("%s:%d cannot be connected with: %s", host, port, error)

    def begin_flush(self, torrent: Torrent) -> None:
        """Hands to the system what libtorrent still has in memory: up to 32 MiB, as long as it
        likes, which a killed process would lose."""
        if torrent._handle is not None:
            torrent._handle.flush_cache()

    async def flush(self, torrent: Torrent) -> None:
        """Waits until the system has all bytes of a finished torrent.  Raises StorageError."""
        torrent._flushed = trio.Event()
        if torrent._handle is None:
            return
        torrent._handle.flush_cache()
        with trio.move_on_after(_FLUSH_TIMEOUT_S) as scope:
            await torrent._flushed.wait()
        if scope.cancelled_caught:
            raise StorageError(f"{torrent.file.name} was not written to the disk in time")
        torrent.raise_error()

    def moved(self, torrent: Torrent, folder: Path) -> None:
        """The file was renamed into that folder, unchanged; it is given from there on."""
        if torrent._handle is not None:
            torrent._handle.set_flags(lt.torrent_flags.upload_mode)
            torrent._handle.move_storage(str(folder), lt.move_flags_t.reset_save_path_unchecked)

    async def recheck(self, torrent: Torrent) -> None:
        """Reads all pieces again and fetches those that are wrong."""
        if torrent._handle is not None:
            torrent.finished = trio.Event()
            torrent._handle.force_recheck()
        await trio.lowlevel.checkpoint()

    async def remove(self, info_hash: bytes) -> None:
        """Leaves a torrent, also if cancelled; its file stays."""
        torrent = self._torrents.get(info_hash)
        if torrent is not None:
            self._leave(torrent)
            with trio.move_on_after(_ADD_TIMEOUT_S):
                await torrent._removed.wait()
            self._forget(torrent)

    def _leave(self, torrent: Torrent) -> None:
        """Begins to leave; one that libtorrent has not taken yet as soon as it has."""
        if not torrent._is_leaving:
            torrent._is_leaving = True
            if torrent._handle is not None:
                self._session.remove_torrent(torrent._handle)

    def _forget(self, torrent: Torrent) -> None:
        """Libtorrent does not have it, or says nothing of it any more."""
        torrent._removed.set()
        info_hash = torrent.file.info_hash()
        if self._torrents.get(info_hash) is torrent:
            del self._torrents[info_hash]

    def set_rates(self, *, upload_rate_bytes_per_s: int, download_rate_bytes_per_s: int) -> None:
        """Limits in bytes per second from now on, 0 for none."""
        self._session.apply_settings(
            {
                "upload_rate_limit": upload_rate_bytes_per_s,
                "download_rate_limit": download_rate_bytes_per_s,
            }
        )

    def forget_session(self) -> None:
        """Nothing can be done with it any more; its torrents have failed."""
        for torrent in self._torrents.values():
            torrent.fail(OurError("the node is leaving"))
            torrent._handle = None
        self._torrents = {}
        del self._session

    # -- what libtorrent says ------------------------------------------------------------------

    async def run(self, alerts: trio.socket.SocketType) -> None:
        """Takes in libtorrent's alerts until told to `stop`.

        Whoever is cancelled together with it may still wait for a torrent's end.
        """
        with self._listening:
            await self._listen(alerts)

    def stop(self) -> None:
        """Nobody waits for anything any more."""
        self._listening.cancel()

    async def _listen(self, alerts: trio.socket.SocketType) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_updating)
            while True:
                await alerts.recv(4096)
                for alert in self._session.pop_alerts():
                    self._take(alert)

    async def _keep_updating(self) -> None:
        while True:
            self._apply_gate()
            if self._torrents:
                self._session.post_torrent_updates()
            await trio.sleep(_UPDATE_INTERVAL_S)
            if time.monotonic() - self._stirred_s > _REST_INTERVAL_S:
                await self._rest()

    async def _rest(self) -> None:
        """Until something stirs, or it is time to look."""
        self._stirred = trio.Event()
        self._session.apply_settings({"tick_interval": REST_TICK_MS})
        with trio.move_on_after(_REST_INTERVAL_S):
            await self._stirred.wait()
        self._session.apply_settings({"tick_interval": TICK_MS})

    def _stir(self) -> None:
        """Something is going on, and how far it is will be asked."""
        self._stirred_s = time.monotonic()
        self._stirred.set()

    def _take(self, alert: Any) -> None:
        """One alert; what is not named here is not needed."""
        if isinstance(alert, lt.state_update_alert):
            for status in alert.status:
                self._note(status)
            return
        self._stir()  # somebody connects, a file is finished
        if isinstance(alert, lt.listen_failed_alert):
            _log.warning("[TORRENT] ✗ %s", alert.message())
            return
        torrent = self._torrent_of(alert)
        if torrent is None:
            return
        match alert:
            case lt.add_torrent_alert():
                if alert.error.value():
                    torrent.fail(OurError(f"libtorrent refuses the torrent: {alert.message()}"))
                    self._forget(torrent)
                else:
                    torrent._handle = alert.handle
                    torrent._added.set()
                    if torrent._is_leaving:
                        self._session.remove_torrent(alert.handle)
            case lt.torrent_finished_alert():
                torrent.finished.set()
            case lt.cache_flushed_alert():
                torrent._flushed.set()
            case lt.torrent_removed_alert():
                self._forget(torrent)
            case lt.hash_failed_alert():
                _log.warning(
                    "[TORRENT] ✗ A piece of %s was not what it should be and is refused",
                    torrent.file.name,
                )
            case lt.peer_ban_alert():
                _log.warning(
                    "[TORRENT] ✗ A source of %s is dropped for what it sent: %s",
                    torrent.file.name,
                    ":".join(str(part) for part in alert.endpoint),
                )
            case lt.file_error_alert():
                torrent.fail(storage_error(torrent.file.name, alert.error.value(), alert.message()))
            case lt.torrent_error_alert():
                torrent.fail(storage_error(torrent.file.name, alert.error.value(), alert.message()))

    def _torrent_of(self, alert: Any) -> Torrent | None:
        if isinstance(alert, lt.torrent_removed_alert):
            return self._torrents.get(alert.info_hashes.v2.to_bytes())
        if isinstance(alert, lt.add_torrent_alert):
            return self._torrents.get(alert.params.info_hashes.v2.to_bytes())
        if not isinstance(alert, lt.torrent_alert) or not alert.handle.is_valid():
            return None
        return next((t for t in self._torrents.values() if t._handle == alert.handle), None)

    def _note(self, status: lt.torrent_status) -> None:
        torrent = self._torrents.get(status.info_hashes.v2.to_bytes())
        if torrent is None:
            return
        now_s = time.monotonic()
        torrent.n_bytes_refused = status.total_failed_bytes
        checking = (lt.torrent_status.checking_files, lt.torrent_status.checking_resume_data)
        torrent.status = TorrentStatus(
            n_bytes_done=status.total_wanted_done,
            download_rate_bytes_per_s=torrent._down.note(now_s, status.total_payload_download),
            upload_rate_bytes_per_s=torrent._up.note(now_s, status.total_payload_upload),
            n_sources=status.num_peers,
            is_checking=status.state in checking,
            n_bytes_uploaded=status.all_time_upload,
        )
        if torrent.status.n_sources or torrent.status.n_bytes_done < torrent.file.n_bytes:
            self._stir()


def storage_error(name: str, number: int, message: str) -> ShardmeshError:
    """What the disk said about a file, as one of our errors; `number` is an errno."""
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return no_room(f"the disk became full while {name} was fetched; what is here of it is kept")
    return StorageError(
        f"{name} cannot be kept: {message}",
        next_step="check the folder's permissions and the disk",
    )
