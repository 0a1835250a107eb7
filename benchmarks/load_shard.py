"""`load-shard`: from LOAD_SHARD for a shard that a node lacks until it announces that it serves it.

Beside it, what nobody can save: the bare transfer of the same file between two processes, and the
loading of the same shard by the same node when the file is there.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import trio

from benchmarks.child import open_child
from benchmarks.generation import N_THREADS
from benchmarks.mesh import CLUSTER
from benchmarks.models import big_model
from benchmarks.results import Result, median_of, paired
from benchmarks.torrent import give, take
from shardmesh.cli.demo_mesh import DemoMesh, DemoProcess, start_mesh, start_process
from shardmesh.coordinator.client import Client, open_client
from shardmesh.errors import OurError
from shardmesh.listener.seeder import link_to, publish_model
from shardmesh.shards.hashing import HashedFile, hash_file
from shardmesh.shards.layers import LayerRange
from shardmesh.shards.split import split_model
from shardmesh.swarm.admission import Admission
from shardmesh.swarm.commands import send_command
from shardmesh.swarm.identity import new_identity

CUTS: Final = (LayerRange(0, 13), LayerRange(13, 16))
"""Of the big model: a shard of 200 MB, and a small one that the node serves meanwhile."""

SHARD, OTHER_SHARD = 0, 1
TIMEOUT_S: Final = 300.0


async def measure_load_shard(*, runs: int, progress: Callable[[str], None]) -> Result:
    """Seconds from the command to the announcement; a node has nothing but the model's link."""
    fetched: list[float] = []
    loaded: list[float] = []
    moved: list[float] = []
    with tempfile.TemporaryDirectory(prefix="shardmesh-bench-") as name:
        folder = Path(name)
        progress("cutting the model")
        model = await trio.to_thread.run_sync(big_model)
        link = await trio.to_thread.run_sync(_publish, model, folder)
        hashed = await trio.to_thread.run_sync(hash_file, folder / "shards" / "shard-0.gguf")
        progress("starting the mesh")
        async with AsyncExitStack() as stack:
            mesh = await stack.enter_async_context(
                start_mesh(
                    folder, 1, cluster=CLUSTER, on_change=lambda mesh: None, n_threads=N_THREADS
                )
            )
            taker = await _open_taker(stack, folder, mesh, link)
            for run in range(runs + 1):
                progress(f"run {run} of {runs}" if run else "warming up")
                moved.append(await _move(folder, hashed))
                fetched.append(await taker.load(SHARD))
                await taker.load(OTHER_SHARD)
                loaded.append(await taker.load(SHARD))
                await taker.load(OTHER_SHARD)
                await trio.to_thread.run_sync(taker.forget_shard)
    bare = [move + load for move, load in zip(moved, loaded, strict=True)]
    ratio, pairs = paired(fetched[1:], bare[1:])
    return Result(
        name="load-shard",
        mesh={
            **median_of(fetched[1:], "s"),
            "pair_ratios": pairs,
            "n_bytes": hashed.torrent.n_bytes,
        },
        baseline={
            **median_of(bare[1:], "s"),
            "download": median_of(moved[1:], "s"),
            "load": median_of(loaded[1:], "s"),
        },
        runs=runs,
        ratio=ratio,
    )


def _publish(model: Path, folder: Path) -> str:
    """Cuts and signs the model; its link, without a bootstrap."""
    split_model(model, CUTS, folder / "shards", name="load-shard")
    return str(link_to(publish_model(folder / "shards", new_identity()), ()))


async def _move(folder: Path, hashed: HashedFile) -> float:
    """Seconds of the bare transfer, until the file is written."""
    async with (
        open_child("benchmarks.torrent_node", "0") as seed,
        open_child("benchmarks.torrent_node", "0") as taker,
    ):
        ports = [await give(seed, hashed, folder / "shards")]
        await taker.ask({"memory": True})  # it has started
        seconds, _ = await take(taker, hashed, folder / "moved", ports)
        return seconds


class _Taker:
    """The node that gets the shard, and a client that tells it to and hears of it."""

    def __init__(self, client: Client, peer_id: str, models_dir: Path) -> None:
        self._client = client
        self._peer_id = peer_id
        self._models_dir = models_dir

    async def load(self, shard_id: int) -> float:
        """Seconds from the command until its announcement says that the shard is loaded."""
        started_s = time.perf_counter()
        with trio.fail_after(TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._command, shard_id)
                await self.wait_loaded(shard_id)
                seconds = time.perf_counter() - started_s
        return seconds

    async def _command(self, shard_id: int) -> None:
        params = {"shard_id": shard_id}
        await send_command(
            self._client.host, self._peer_id, "LOAD_SHARD", params, timeout_s=TIMEOUT_S
        )

    async def wait_loaded(self, shard_id: int) -> None:
        directory = self._client.directory
        while True:
            version = directory.version
            known = directory.get(self._peer_id)
            if known and known.shard_id == shard_id and known.capabilities.shard_loaded:
                return
            await directory.wait_changed(version)

    def forget_shard(self) -> None:
        """The shard's file is not there any more."""
        (path,) = self._models_dir.glob(f"*/shard-{SHARD}.gguf")
        path.unlink()


async def _open_taker(stack: AsyncExitStack, folder: Path, mesh: DemoMesh, link: str) -> _Taker:
    """Starts the node and waits until it serves the other shard."""
    client = await stack.enter_async_context(
        open_client(
            bootstraps=[mesh.bootstrap_address],
            cluster=CLUSTER,
            admission=Admission(mesh.secret),
            shards_dir=folder / "none",
            cache_dir=folder / "cache",
        )
    )
    others = {a.peer_id for a in client.directory.all()}
    models_dir = folder / "taker"
    arguments = (
        *("listen", "--model", link, "--shard-id", str(OTHER_SHARD)),
        *("--models-dir", str(models_dir), "--state-dir", str(folder / "state")),
        *("--bootstrap", mesh.bootstrap_address, "--cluster", CLUSTER),
        *("--listen-addr", "127.0.0.1", "--no-mdns", "--log-format", "json"),
        *("--threads", str(N_THREADS)),
    )
    await stack.enter_async_context(start_process(DemoProcess("taker", arguments)))
    taker = _Taker(client, await _newcomer(client, others), models_dir)
    with trio.fail_after(TIMEOUT_S):
        await taker.wait_loaded(OTHER_SHARD)
    return taker


async def _newcomer(client: Client, others: set[str]) -> str:
    """The peer id of the node that has come, which is connected with."""
    with trio.move_on_after(TIMEOUT_S):
        while True:
            version = client.directory.version
            for announcement in client.directory.all():
                if announcement.peer_id not in others:
                    await client.host.connect(announcement.addresses, TIMEOUT_S)
                    return announcement.peer_id
            await client.directory.wait_changed(version)
    raise OurError("the node was never announced")
