"""The siege: sessions without pause while one process after the other is killed and comes back."""

from __future__ import annotations

import dataclasses
import os
import random
import time

import psutil
import pytest
import trio
from faults.conftest import Measured
from faults.fortress import IS_FULL, N_REPLICAS, N_STAGES, Fortress, request, write

from shardmesh.coordinator.client import Client
from shardmesh.coordinator.request import CompletionRequest
from shardmesh.errors import ShardmeshError

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(900)]

SIEGE_S = float(os.environ.get("SHARDMESH_SIEGE_S", "300" if IS_FULL else "24"))
KILL_EVERY_S = 10.0 if IS_FULL else 6.0
N_WRITERS = 4
N_TOKENS = 80
WAIT_S = 60.0  # a listener that is started again, on a machine with other things to do
DESCRIPTORS_SPARE = 16
PROMPTS = (
    "Once upon a time there was a king who",
    "Far away, where the swallows fly when we have winter, dwelt",
    "The old queen said to the miller that his daughter " * 6,
    "Once",
)


@dataclasses.dataclass
class Siege:
    """What has happened so far."""

    texts: dict[int, str] = dataclasses.field(default_factory=dict)  # undisturbed, by writer
    n_finished: int = 0
    n_repairs: int = 0
    n_asked_again: int = 0  # before the first piece of text
    longest_gap_s: float = 0.0
    kills: list[str] = dataclasses.field(default_factory=list)
    lost: list[str] = dataclasses.field(default_factory=list)


def asked_by(writer: int) -> CompletionRequest:
    return request(PROMPTS[writer], n_tokens=N_TOKENS, seed=writer, wait_s=WAIT_S)


async def keep_writing(client: Client, siege: Siege, writer: int, until_s: float) -> None:
    while time.monotonic() < until_s:
        n_pieces = 0

        async def count(_completion: object) -> None:
            nonlocal n_pieces
            n_pieces += 1

        try:
            written = await write(client, asked_by(writer), at_piece=1, disturb=count)
        except ShardmeshError as error:
            if n_pieces or error.blame != "moment":
                siege.lost.append(f"writer {writer}: [{error.code}] {error}")
                return
            siege.n_asked_again += 1
            await trio.sleep(0.2)
            continue
        if written.text != siege.texts[writer]:
            siege.lost.append(f"writer {writer} wrote something else: {written.repairs}")
            return
        siege.n_finished += 1
        siege.n_repairs += len(written.repairs)
        siege.longest_gap_s = max(siege.longest_gap_s, written.longest_gap_s)


async def keep_killing(fortress: Fortress, siege: Siege, until_s: float) -> None:
    chance = random.Random(len(PROMPTS))
    while time.monotonic() + KILL_EVERY_S < until_s:
        await trio.sleep(KILL_EVERY_S)
        number = chance.randrange(N_STAGES * N_REPLICAS)
        running = fortress.mesh.listeners[number].running
        kind = chance.choice(("data", "control"))
        siege.kills.append(f"{kind} process of replica {number // N_STAGES} of {number % N_STAGES}")
        if kind == "data":
            for child in running.children():
                child.kill()
        else:
            running.process.kill()
            await trio.to_thread.run_sync(running.wait_end)
            fortress.start_again(number)


def test_no_session_is_lost_in_a_siege(fortress: Fortress, measured: Measured) -> None:
    siege = Siege()
    bootstrap = psutil.Process(fortress.mesh.bootstrap.running.process.pid)
    n_descriptors = bootstrap.num_fds(), psutil.Process().num_fds()
    data_processes = {node.running.data_process() for node in fortress.mesh.listeners}

    async def use(client: Client) -> None:
        for writer in range(N_WRITERS):
            siege.texts[writer] = (await write(client, asked_by(writer))).text
        until_s = time.monotonic() + SIEGE_S
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_killing, fortress, siege, until_s)
            for writer in range(N_WRITERS):
                nursery.start_soon(keep_writing, client, siege, writer, until_s)
        assert client.coordinator.n_sessions == 0

    fortress.run(use)
    measured(
        f"{SIEGE_S:.0f} s, {len(siege.kills)} kills, {siege.n_finished} texts finished, all the "
        f"same, {siege.n_repairs} stages replaced, longest pause {siege.longest_gap_s:.1f} s, "
        f"{len(siege.lost)} sessions lost"
    )
    assert not siege.lost, "\n".join([*siege.lost, *siege.kills])
    assert siege.n_finished >= N_WRITERS
    assert siege.kills
    fortress.wait_whole()
    # Nothing is left behind: one data process for each listener, those of the dead are gone.
    now = {node.running.data_process() for node in fortress.mesh.listeners}
    assert not [p for p in data_processes - now if p.is_running() and p.status() != "zombie"]
    assert bootstrap.num_fds() <= n_descriptors[0] + DESCRIPTORS_SPARE
    assert psutil.Process().num_fds() <= n_descriptors[1] + DESCRIPTORS_SPARE
