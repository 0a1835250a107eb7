"""Coordinators and bootstraps that go away."""

from __future__ import annotations

import signal
import time

import pytest
import trio
from faults.conftest import Measured
from faults.fortress import N_STAGES, Fortress, request, write
from support.asking import ask
from support.processes import start_bootstrap

from shardmesh.coordinator.client import Client

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(600)]

FREE_WITHIN_S = 30.0
JOIN_WITHIN_S = 10.0


def n_sessions(fortress: Fortress) -> int:
    return sum(answer["n_sessions"] for answer in ask(fortress.mesh, "GET_METRICS"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_coordinator_that_goes_away(
    fortress: Fortress, measured: Measured, number: signal.Signals
) -> None:
    """Killed, its connections end; stopped, as by a power cut, it just says nothing more."""
    options = ("--ignore-end", "--max-tokens", "1000", "--seed", "1")
    running = fortress.mesh.space.start("run", "Once", *options, *fortress.mesh.where)
    running.wait_line(r"\w")
    assert n_sessions(fortress) == N_STAGES
    begun_s = time.monotonic()
    running.process.send_signal(number)
    try:
        while n_sessions(fortress):
            assert time.monotonic() - begun_s < FREE_WITHIN_S
    finally:
        running.process.kill()
    measured(f"{number.name}: KV free after {time.monotonic() - begun_s:.1f} s")


def test_the_bootstrap_is_down(fortress: Fortress, measured: Measured) -> None:
    """A session goes on without noticing, and a node that was here before joins."""
    mesh = fortress.mesh
    port = mesh.bootstrap.port

    async def use(client: Client) -> None:
        async def down(_completion: object) -> None:
            mesh.bootstrap.running.process.kill()
            await trio.to_thread.run_sync(mesh.bootstrap.running.wait_end)

        written = await write(client, at_piece=10, disturb=down)
        assert written.text == fortress.text
        assert not written.repairs
        measured(f"longest pause of a running session {written.longest_gap_s:.2f} s")
        again = await write(client, request())
        assert again.text == fortress.text

    fortress.run(use)
    code, _ = mesh.listeners[0].running.end()
    assert code == 0
    begun_s = time.monotonic()
    fortress.start_again(0)
    again = mesh.listeners[0].running
    again.wait_line("Peer ID")
    up_s = time.monotonic()
    again.wait_line("Joined through a remembered node")
    joined_s = time.monotonic() - up_s
    measured(f"a new node joins after {joined_s:.1f} s (its start: {up_s - begun_s:.1f} s)")
    assert joined_s < JOIN_WITHIN_S
    mesh.bootstrap = start_bootstrap(mesh.space, mesh.cluster, port=port)
    fortress.wait_whole()
