"""`torrent` and `swarm`: a file of 200 MB between processes of this machine, over BitTorrent.

Beside it, what the machine itself needs to copy the file and compute its SHA-256.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import trio

from benchmarks.child import Child, open_child
from benchmarks.results import Result, median_of, paired
from shardmesh.errors import OurError
from shardmesh.shards.checked import sha256_of
from shardmesh.shards.hashing import HashedFile, hash_file

N_BYTES: Final = 200_000_000
N_SWARM: Final = 4
SWARM_UPLOAD_RATE: Final = 50_000_000
N_MEMORY_FILES: Final = 10
MEMORY_FILE_BYTES: Final = 10**9


async def measure_torrents(*, runs: int, progress: Callable[[str], None]) -> list[Result]:
    """From one seed, from two, and the memory of a node that gives ten files of 1 GB."""
    with tempfile.TemporaryDirectory(prefix="shardmesh-bench-") as name:
        folder = Path(name)
        progress("torrent: making the file")
        hashed = await trio.to_thread.run_sync(_make_file, folder / "source")
        results = []
        for n_seeds in (1, 2):
            rates, copy_rates, checked_s = [], [], []
            for run in range(runs):
                progress(f"torrent, {n_seeds} seeds: run {run + 1} of {runs}")
                seconds, checked = await _fetch_once(folder, hashed, n_seeds)
                rates.append(N_BYTES / 1e6 / seconds)
                checked_s.append(checked)
                copied_s = await trio.to_thread.run_sync(_copy, folder)
                copy_rates.append(N_BYTES / 1e6 / copied_s)
            ratio, pairs = paired(rates, copy_rates)
            results.append(
                Result(
                    name=f"torrent-{n_seeds}-seed{'s' if n_seeds > 1 else ''}",
                    mesh={
                        **median_of(rates, "mb_per_s"),
                        "checked_s": round(statistics.median(checked_s), 3),
                        "pair_ratios": pairs,
                    },
                    baseline=median_of(copy_rates, "mb_per_s"),
                    runs=runs,
                    ratio=ratio,
                )
            )
        progress("torrent: memory")
        results.append(await _measure_memory(folder, hashed))
        return results


async def measure_swarm(*, runs: int, progress: Callable[[str], None]) -> list[Result]:
    """Four nodes from one slow seed: when the last is done, against one node alone."""
    with tempfile.TemporaryDirectory(prefix="shardmesh-bench-") as name:
        folder = Path(name)
        hashed = await trio.to_thread.run_sync(_make_file, folder / "source")
        alone: list[float] = []
        together: list[float] = []
        for run in range(runs):
            progress(f"swarm: run {run + 1} of {runs}")
            alone.append(await _fetch_at_once(folder, hashed, 1))
            together.append(await _fetch_at_once(folder, hashed, N_SWARM))
        ratio, pairs = paired(together, alone)
        return [
            Result(
                name=f"swarm-{N_SWARM}",
                mesh={**median_of(together, "s"), "pair_ratios": pairs},
                baseline=median_of(alone, "s"),
                runs=runs,
                ratio=ratio,
            )
        ]


def _make_file(folder: Path) -> HashedFile:
    folder.mkdir()
    path = folder / "shard-0.gguf"
    path.write_bytes(random.Random(1).randbytes(N_BYTES))
    return hash_file(path)


def _copy(folder: Path) -> float:
    """Seconds to copy the file and compute the copy's SHA-256."""
    started_s = time.perf_counter()
    copy = folder / "copy.gguf"
    shutil.copyfile(folder / "source" / "shard-0.gguf", copy)
    sha256_of(copy)
    copy.unlink()
    return time.perf_counter() - started_s


async def give(child: Child, hashed: HashedFile, folder: Path) -> int:
    """Has a `torrent_node` give the file of the folder; its port."""
    torrent = hashed.torrent.encode().hex()
    answer = await child.ask({"do": "give", "torrent": torrent, "folder": str(folder)})
    return int(answer["port"])


async def take(
    child: Child, hashed: HashedFile, folder: Path, ports: list[int]
) -> tuple[float, float]:
    """Has a `torrent_node` fetch it; seconds until it is there, and until it is checked too."""
    await trio.to_thread.run_sync(folder.mkdir)
    request = {"do": "fetch", "torrent": hashed.torrent.encode().hex(), "folder": str(folder)}
    answer = await child.ask({**request, "ports": ports})
    await trio.to_thread.run_sync(shutil.rmtree, folder)
    if answer["sha256"] != hashed.sha256:
        raise OurError("the file that came is not the one that was given")
    return answer["s"], answer["checked_s"]


async def _fetch_once(folder: Path, hashed: HashedFile, n_seeds: int) -> tuple[float, float]:
    """Seconds until the file is there, and until it is checked too."""
    async with AsyncExitStack() as stack:
        seeds = [
            await stack.enter_async_context(open_child("benchmarks.torrent_node", "0"))
            for _ in range(n_seeds)
        ]
        ports = [await give(seed, hashed, folder / "source") for seed in seeds]
        taker = await stack.enter_async_context(open_child("benchmarks.torrent_node", "0"))
        await taker.ask({"memory": True})  # it has started
        return await take(taker, hashed, folder / "taken", ports)


async def _fetch_at_once(folder: Path, hashed: HashedFile, n_takers: int) -> float:
    """Seconds until the last of several nodes has the file; all know each other."""
    rate = str(SWARM_UPLOAD_RATE)
    async with AsyncExitStack() as stack:
        seed = await stack.enter_async_context(open_child("benchmarks.torrent_node", rate))
        ports = [await give(seed, hashed, folder / "source")]
        takers = [
            await stack.enter_async_context(open_child("benchmarks.torrent_node", "0"))
            for _ in range(n_takers)
        ]
        own = [int((await taker.ask({"memory": True}))["port"]) for taker in takers]
        times: list[float] = []

        async def take_one(number: int) -> None:
            others = [port for port in own if port != own[number]]
            target = folder / f"taken-{number}"
            times.append((await take(takers[number], hashed, target, ports + others))[0])

        async with trio.open_nursery() as nursery:
            for number in range(n_takers):
                nursery.start_soon(take_one, number)
        return max(times)


async def _measure_memory(folder: Path, hashed: HashedFile) -> Result:
    """A node that gives ten files of 1 GB, one of which is read from; holes take no disk."""
    source = folder / "large"
    source.mkdir()
    first = source / "shard-0.gguf"
    with first.open("wb") as file:
        file.truncate(MEMORY_FILE_BYTES)
    large = (await trio.to_thread.run_sync(hash_file, first)).torrent
    async with (
        open_child("benchmarks.torrent_node", "0") as seed,
        open_child("benchmarks.torrent_node", "0") as taker,
    ):
        before = (await seed.ask({"memory": True}))["bytes"]
        for number in range(N_MEMORY_FILES):
            path = source / f"shard-{number}.gguf"
            with path.open("ab") as file:
                file.truncate(MEMORY_FILE_BYTES)
            torrent = dataclasses.replace(large, name=path.name)
            port = await give(seed, HashedFile("", torrent), source)
        (folder / "taken").mkdir()
        request = {"do": "fetch", "torrent": large.encode().hex(), "folder": str(folder / "taken")}
        await taker.ask({**request, "ports": [port]})
        after = (await seed.ask({"memory": True}))["bytes"]
    grown_mb = round((after - before) / 1e6, 1)
    return Result(
        name="torrent-memory",
        mesh={"grown_mb": grown_mb, "n_files": N_MEMORY_FILES},
        baseline={"rss_mb": round(before / 1e6, 1)},
        runs=1,
        ratio=round(after / before, 3),
    )
