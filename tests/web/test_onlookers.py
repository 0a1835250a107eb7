"""Many pages that only look on: what they cost a gateway, and that all are told of a change."""

from __future__ import annotations

import psutil
import pytest
import trio
from support.processes import Mesh, start_bootstrap, workspace

from benchmarks.websocket import Onlooker, open_onlooker
from shardmesh.confinement import allow_files
from shardmesh.demo_model import DEMO_MODEL

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not DEMO_MODEL.exists(), reason="the demo model is not here"),
]

N_ONLOOKERS = 1000
MEMORY_MB_MAX = 100
OPENING_AT_ONCE = 20


async def open_all(port: int) -> list[Onlooker]:
    """Sockets that have had their greeting and the first state, as a page has."""
    found: list[Onlooker] = []
    at_once = trio.CapacityLimiter(OPENING_AT_ONCE)

    async def open_one() -> None:
        async with at_once:
            onlooker = await open_onlooker(port)
            found.append(onlooker)
            assert (await onlooker.next())["type"] == "hello"
            assert (await onlooker.next())["type"] == "state"

    async with trio.open_nursery() as nursery:
        for _ in range(N_ONLOOKERS):
            nursery.start_soon(open_one)
    return found


async def test_a_thousand_idle_websockets() -> None:
    """They take less than 100 MB, and each hears of a node that joins."""
    allow_files()
    with workspace() as space:
        shards = space.folder / "shards"
        done = await trio.to_thread.run_sync(
            lambda: space.run("split", str(DEMO_MODEL), "--shards", "1", "--out", str(shards))
        )
        assert done.code == 0, done.err
        mesh = Mesh(space, "test", shards, start_bootstrap(space, "test"))
        state = ("--state-dir", str(space.folder / "web"))
        web = space.start("web", *mesh.where, "--port", "0", "--ws-port", "0", *state)
        port = int(web.wait_line(r"WebSocket on ws://127.0.0.1:(\d+)/", 60)[1])
        process = psutil.Process(web.process.pid)
        first = await open_onlooker(port)
        await first.next()
        before = process.memory_info().rss
        onlookers = await open_all(port)
        added_mb = (process.memory_info().rss - before) / 2**20
        assert added_mb < MEMORY_MB_MAX

        node = mesh.listen(0)
        told = trio.CapacityLimiter(N_ONLOOKERS)

        async def hear_of_it(onlooker: Onlooker) -> None:
            async with told:
                while node.peer_id not in str(await onlooker.next()):
                    pass

        async with trio.open_nursery() as nursery:
            for onlooker in onlookers:
                nursery.start_soon(hear_of_it, onlooker)
        for onlooker in (first, *onlookers):
            await onlooker.aclose()
