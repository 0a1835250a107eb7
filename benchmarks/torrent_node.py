"""One end of `torrent`, `swarm` and `seeding`: a child with a torrent session of its own."""

from __future__ import annotations

import queue
import sys
import threading
import time
from pathlib import Path

import psutil
import trio

from benchmarks.child import Answer, serve_requests
from shardmesh.shards.checked import sha256_of
from shardmesh.swarm.torrents.opening import open_torrents
from shardmesh.swarm.torrents.session import Torrent, TorrentSession
from shardmesh.wire.torrent_file import TorrentFile, decode_torrent

START_TIMEOUT_S = 30.0


async def _give(torrents: TorrentSession, file: TorrentFile, folder: Path) -> Answer:
    await torrents.add(file, folder, is_whole=True)
    return {"port": torrents.port}


async def _begin(
    torrents: TorrentSession, file: TorrentFile, folder: Path, ports: list[int]
) -> Torrent:
    sources = [("127.0.0.1", port) for port in ports]
    return await torrents.add(file, folder, is_whole=False, sources=sources)


async def _leave(torrents: TorrentSession, file: TorrentFile) -> Answer:
    """Breaks a download off; how many bytes had come, whole pieces only."""
    torrent = torrents.get(file.info_hash())
    n_bytes = torrent.status.n_bytes_done if torrent is not None else 0
    await torrents.remove(file.info_hash())
    return {"n_bytes": n_bytes}


async def _fetch(
    torrents: TorrentSession, file: TorrentFile, folder: Path, ports: list[int]
) -> Answer:
    """Seconds until the file is whole, written and its SHA-256 computed."""
    started_s = time.perf_counter()
    torrent = await _begin(torrents, file, folder, ports)
    await torrent.finished.wait()
    torrent.raise_error()
    await torrents.flush(torrent)
    here_s = time.perf_counter() - started_s
    sha256 = await trio.to_thread.run_sync(sha256_of, folder / file.name)
    return {"s": here_s, "checked_s": time.perf_counter() - started_s, "sha256": sha256}


async def _answer(torrents: TorrentSession, request: Answer) -> Answer:
    if "memory" in request:
        return {"bytes": psutil.Process().memory_info().rss, "port": torrents.port}
    file = decode_torrent(bytes.fromhex(request["torrent"]))
    folder = Path(request["folder"])
    if request["do"] == "give":
        return await _give(torrents, file, folder)
    if request["do"] == "leave":
        return await _leave(torrents, file)
    if request["do"] == "begin":
        await _begin(torrents, file, folder, request["ports"])
        return {}
    return await _fetch(torrents, file, folder, request["ports"])


class _Node:
    """The session on a trio loop in a thread of its own; the main thread reads the requests."""

    def __init__(self, upload_rate_bytes_per_s: int) -> None:
        self._upload_rate_bytes_per_s = upload_rate_bytes_per_s
        self._started: queue.Queue[tuple[trio.lowlevel.TrioToken, TorrentSession]] = queue.Queue()
        self._over = trio.Event()

    async def run(self) -> None:
        async with open_torrents(
            listen_hosts=["127.0.0.1"], upload_rate_bytes_per_s=self._upload_rate_bytes_per_s
        ) as torrents:
            self._started.put((trio.lowlevel.current_trio_token(), torrents))
            await self._over.wait()

    def serve(self) -> None:
        """Answers until standard input ends."""
        thread = threading.Thread(target=trio.run, args=(self.run,))
        thread.start()
        token, torrents = self._started.get(timeout=START_TIMEOUT_S)

        def answer(request: Answer) -> Answer:
            return trio.from_thread.run(_answer, torrents, request, trio_token=token)

        try:
            serve_requests(answer)
        finally:
            trio.from_thread.run_sync(self._over.set, trio_token=token)
            thread.join()


if __name__ == "__main__":
    _Node(int(sys.argv[1])).serve()
