"""The directory is right again soon after a node was killed, stopped, and woken up."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest
import trio
from support.asking import as_client
from support.processes import Mesh, Node, Workspace, start_bootstrap, workspace

from shardmesh.coordinator.client import Client
from shardmesh.swarm.directory import Directory, exchange

pytestmark = [pytest.mark.processes, pytest.mark.slow]

KILLED_TARGET_S, STOPPED_TARGET_S = 5.0, 10.0
SLACK_S = 5.0  # for a machine with other things to do
BACK_TIMEOUT_S = 30.0
JOIN_LIMIT_S = 30.0  # with its start; the target is 10 s from being up
MODEL = ("--total-shards", "2", "--total-layers", "2", "--model-name", "none")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """A bootstrap and three listeners without the file of their shard."""
    with workspace() as space:
        yield a_mesh(space)


def a_mesh(space: Workspace) -> Mesh:
    folder = space.folder / "nothing"
    folder.mkdir()
    mesh = Mesh(space, "fresh", folder, start_bootstrap(space, "fresh"))
    for number in range(3):
        state = ("--state-dir", str(space.folder / f"state-{number}"))
        mesh.listeners.append(mesh.listen(number % 2, *MODEL, *state))
    mesh.wait_ready()
    return mesh


class Observer:
    """Asks nodes for their directories and keeps nothing of what they say."""

    def __init__(self, mesh: Mesh, client: Client) -> None:
        self.mesh = mesh
        self.client = client

    async def seconds_until(self, asked: Node, wanted: set[str], timeout_s: float) -> float:
        """How long it takes until a node tells of exactly these listeners."""
        begun_s = trio.current_time()
        found: set[str] = set()
        with trio.move_on_after(timeout_s):
            while found != wanted:
                told = Directory(self.mesh.cluster)
                await exchange(self.client.host, told, asked.peer_id)
                found = {a.peer_id for a in told.all()}
                await trio.sleep(0.1)
        assert found == wanted
        return trio.current_time() - begun_s

    async def all_agree(self, asked: list[Node], wanted: set[str], timeout_s: float) -> float:
        """How long it takes until the last of these nodes tells of exactly these listeners."""
        took_s: list[float] = []

        async def watch(node: Node) -> None:
            took_s.append(await self.seconds_until(node, wanted, timeout_s))

        async with trio.open_nursery() as nursery:
            for node in asked:
                nursery.start_soon(watch, node)
        return max(took_s)


def test_stopped_and_woken_then_killed(mesh: Mesh) -> None:
    witness, sleeper, victim = mesh.listeners
    everybody = {node.peer_id for node in mesh.listeners}

    async def observe(client: Client) -> None:
        observer = Observer(mesh, client)
        asked = [mesh.bootstrap, witness]
        for node in asked:
            await client.host.connect([node.address], 10)
        await observer.all_agree(asked, everybody, BACK_TIMEOUT_S)

        os.kill(sleeper.running.process.pid, signal.SIGSTOP)
        left = everybody - {sleeper.peer_id}
        took_s = await observer.all_agree(asked, left, STOPPED_TARGET_S + SLACK_S)
        print(f"stopped: right after {took_s:.1f} s")
        os.kill(sleeper.running.process.pid, signal.SIGCONT)
        took_s = await observer.all_agree(asked, everybody, BACK_TIMEOUT_S)
        print(f"awake: right after {took_s:.1f} s")

        victim.running.process.kill()
        left = everybody - {victim.peer_id}
        took_s = await observer.all_agree(asked, left, KILLED_TARGET_S + SLACK_S)
        print(f"killed: right after {took_s:.1f} s")

    as_client(mesh, observe)


def test_without_the_bootstrap_new_nodes_and_clients_still_join(mesh: Mesh) -> None:
    """Where a node of this mesh has run before; the last test, since it ends the bootstrap."""
    state = ("--state-dir", str(mesh.space.folder / "state-0"))
    first = mesh.listeners[0]
    mesh.bootstrap.running.process.kill()
    late = mesh.listen(1, *MODEL, *state)
    late.running.wait_line("Joined through a remembered node", JOIN_LIMIT_S)
    late.wait_announced()
    done = mesh.space.run("status", "--json", *mesh.where, *state)
    assert {first.peer_id, late.peer_id} <= {
        replica["peer_id"] for model in json.loads(done.out) for replica in model["replicas"]
    }, done.err
