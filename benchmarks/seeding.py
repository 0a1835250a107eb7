"""`seeding`: what a running generation loses while its node gives a file to another process.

The other process takes as fast as it gets; that the node backs off while it computes is its own
doing.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from benchmarks.child import Child, open_child
from benchmarks.generation import DECODE_PROMPT, Generation
from benchmarks.mesh import Mesh, open_mesh, split
from benchmarks.results import Result, median_of, paired
from shardmesh.errors import OurError
from shardmesh.shards.hashing import hash_file
from shardmesh.wire.torrent_file import TorrentFile

N_TOKENS: Final = 512
FILE_BYTES: Final = 2 * 10**9
"""More than is given while the tokens are written; holes, which take no disk."""

GIVEN_TIMEOUT_S: Final = 120.0
ATTEMPT_S: Final = 1.0


async def measure_seeding(model: Path, *, runs: int, progress: Callable[[str], None]) -> Result:
    """Tokens per second of one session, with and without somebody who downloads from the node."""
    busy: list[float] = []
    alone: list[float] = []
    given: list[float] = []
    with tempfile.TemporaryDirectory(prefix="shardmesh-bench-") as name:
        folder = Path(name)
        progress("cutting the model, making a large file")
        await trio.to_thread.run_sync(split, model, 1, folder)
        file = await trio.to_thread.run_sync(_make_file, folder / "models" / "large")
        progress("starting the mesh")
        async with (
            open_mesh(folder, 1) as mesh,
            open_child("benchmarks.torrent_node", "0") as child,
        ):
            peer = _Peer(child, mesh, file, folder / "taken")
            with trio.fail_after(GIVEN_TIMEOUT_S):
                await peer.wait_given()
            for run in range(runs + 1):
                progress(f"pair {run} of {runs}" if run else "warming up")
                alone.append(_rate(await mesh.generate(DECODE_PROMPT, N_TOKENS)))
                await peer.begin()
                busy.append(_rate(await mesh.generate(DECODE_PROMPT, N_TOKENS)))
                given.append(await peer.leave())
    ratio, pairs = paired(busy[1:], alone[1:])
    return Result(
        name="seeding",
        mesh={
            **median_of(busy[1:], "tokens_per_s"),
            "pair_ratios": pairs,
            "given": median_of(given[1:], "mb_per_s"),
            "n_tokens": N_TOKENS,
        },
        baseline=median_of(alone[1:], "tokens_per_s"),
        runs=runs,
        ratio=ratio,
    )


def _make_file(folder: Path) -> TorrentFile:
    folder.mkdir(parents=True)
    path = folder / "large.gguf"
    with path.open("wb") as file:
        file.truncate(FILE_BYTES)
    return hash_file(path).torrent


def _rate(generation: Generation) -> float:
    return generation.decode_tokens_per_s or 0.0


@dataclasses.dataclass
class _Peer:
    """The process that downloads from the node, with a folder to do it in."""

    child: Child
    mesh: Mesh
    file: TorrentFile
    folder: Path
    begun_s: float = 0.0

    async def wait_given(self) -> None:
        """Waits until the node gives the file, which it has to hash before."""
        while not await self.mesh.torrent_port(self.file.info_hash()):  # noqa: ASYNC110 - it does not tell
            await trio.sleep(ATTEMPT_S)

    async def begin(self) -> None:
        port = await self.mesh.torrent_port(self.file.info_hash())
        await trio.to_thread.run_sync(self.folder.mkdir)
        await self._ask("begin", port)
        self.begun_s = time.perf_counter()

    async def leave(self) -> float:
        """Ends the download, which must not have been over; the MB that came per second."""
        n_bytes = (await self._ask("leave", 0))["n_bytes"]
        seconds = time.perf_counter() - self.begun_s
        await trio.to_thread.run_sync(shutil.rmtree, self.folder)
        if n_bytes == self.file.n_bytes:
            raise OurError("the download was over before the generation was")
        return float(n_bytes / 1e6 / seconds)

    async def _ask(self, what: str, port: int) -> dict[str, int]:
        torrent = self.file.encode().hex()
        request = {"do": what, "torrent": torrent, "folder": str(self.folder), "ports": [port]}
        return await self.child.ask(request)
