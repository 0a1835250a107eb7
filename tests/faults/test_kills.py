"""Stages killed, stopped and slowed down in the middle of a text: the same text, after a pause."""

from __future__ import annotations

import dataclasses
import signal
import time

import psutil
import pytest
import trio
from faults.conftest import Measured
from faults.fortress import (
    N_STAGES,
    N_TOKENS,
    Disturb,
    Fortress,
    Written,
    percentile,
    request,
    write,
)

from shardmesh.coordinator.client import Client
from shardmesh.coordinator.coordinator import Completion
from shardmesh.errors import ShardmeshError

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(600)]

N_ROUNDS = 4
CONTEXTS = (64, 256, 512, 960)
MIDDLE = N_TOKENS // 2
WHENS = ("prefill", "decode", "between send and reply")


async def write_with(client: Client, when: str, disturb: Disturb) -> Written:
    if when == "prefill":
        return await write(client, in_prefill=disturb)
    if when == "decode":
        return await write(client, at_piece=MIDDLE, disturb=disturb)

    async with trio.open_nursery() as nursery:

        async def soon(completion: Completion) -> None:
            # The next token is on its way when this goes on.
            nursery.start_soon(_after, 0.002, completion, disturb)

        return await write(client, at_piece=MIDDLE, disturb=soon)


async def _after(pause_s: float, completion: Completion, disturb: Disturb) -> None:
    await trio.sleep(pause_s)
    await disturb(completion)


@pytest.mark.parametrize("when", WHENS)
def test_kill_of_a_stage(fortress: Fortress, measured: Measured, when: str) -> None:
    pauses_s: list[float] = []

    async def trial(client: Client, stage: int) -> None:
        lost: list[str] = []

        async def kill(completion: Completion) -> None:
            lost.append(completion.chain.stages[stage].peer_id)
            fortress.signal_data(lost[0])

        written = await write_with(client, when, kill)
        assert written.text == fortress.text
        assert lost[0] in [repair.lost_peer_id for repair in written.repairs]
        pauses_s.append(max(written.longest_gap_s, *(r.pause_s for r in written.repairs)))

    for stage in list(range(N_STAGES)) * N_ROUNDS:

        async def use(client: Client, stage: int = stage) -> None:
            await trial(client, stage)

        fortress.run(use)
        fortress.wait_whole()
    worst_s = percentile(pauses_s, 0.99)
    measured(f"{len(pauses_s)} kills in {when}: p50 {percentile(pauses_s, 0.5):.2f} s")
    measured(f"p99 {worst_s:.2f} s")
    assert worst_s < 2.0


@pytest.mark.parametrize("n_prompt", CONTEXTS)
def test_kill_behind_a_long_prompt(fortress: Fortress, measured: Measured, n_prompt: int) -> None:
    """The replacement computes all that the lost stage had computed."""
    asked = dataclasses.replace(
        request(n_tokens=20), prompt=None, prompt_tokens=tuple(20 + i % 99 for i in range(n_prompt))
    )
    gaps_s: list[float] = []

    async def use(client: Client) -> None:
        async def kill(completion: Completion) -> None:
            fortress.signal_data(completion.chain.stages[1].peer_id)

        undisturbed = await write(client, asked)
        written = await write(client, asked, at_piece=10, disturb=kill)
        assert written.text == undisturbed.text
        assert written.repairs
        gaps_s.append(written.longest_gap_s)

    for _ in range(N_ROUNDS):
        fortress.run(use)
        fortress.wait_whole()
    measured(f"{n_prompt} tokens: {percentile(gaps_s, 0.5):.2f} s")


def test_two_stages_killed_at_once(fortress: Fortress, measured: Measured) -> None:
    gaps_s: list[float] = []

    async def use(client: Client) -> None:
        async def kill_two(completion: Completion) -> None:
            for stage in completion.chain.stages[:2]:
                fortress.signal_data(stage.peer_id)

        written = await write(client, at_piece=MIDDLE, disturb=kill_two)
        assert written.text == fortress.text
        gaps_s.append(written.longest_gap_s)

    for _ in range(N_ROUNDS):
        fortress.run(use)
        fortress.wait_whole()
    measured(f"two at once {max(gaps_s):.2f} s")
    assert max(gaps_s) < 5.0


def test_a_kill_during_a_recovery(fortress: Fortress, measured: Measured) -> None:
    """First a stage, then, while another replica of it is being filled, a stage that was well."""
    gaps_s: list[float] = []

    async def use(client: Client) -> None:
        async with trio.open_nursery() as nursery:

            async def kill_soon(completion: Completion) -> None:
                await trio.sleep(0.02)
                fortress.signal_data(completion.chain.stages[0].peer_id)

            async def kill(completion: Completion) -> None:
                fortress.signal_data(completion.chain.stages[1].peer_id)
                nursery.start_soon(kill_soon, completion)

            written = await write(client, at_piece=MIDDLE, disturb=kill)
            assert written.text == fortress.text
            assert len(written.repairs) >= 2
            gaps_s.append(written.longest_gap_s)

    for _ in range(N_ROUNDS):
        fortress.run(use)
        fortress.wait_whole()
    measured(f"during recovery {max(gaps_s):.2f} s")
    assert max(gaps_s) < 5.0


def test_no_replica_left(fortress: Fortress, measured: Measured) -> None:
    numbers = [1, 1 + N_STAGES]
    took_s: list[float] = []
    lost: list[str] = []

    async def use(client: Client) -> None:
        async def lose_all(completion: Completion) -> None:
            stage = completion.chain.stages[1]
            lost.append(f"layers [{stage.layer_start}, {stage.layer_end})")
            for number in numbers:
                fortress.mesh.listeners[number].running.process.kill()
            took_s.append(time.monotonic())

        with pytest.raises(ShardmeshError) as caught:
            await write(client, request(wait_s=2.0), at_piece=MIDDLE, disturb=lose_all)
        took_s.append(time.monotonic())
        assert (caught.value.code, caught.value.blame) == ("STAGE_LOST", "moment")
        assert lost[0] in str(caught.value)
        fortress.start_again(numbers[0])
        fortress.start_again(numbers[1])

    fortress.run(use)
    fortress.wait_whole()
    measured(f"error after {took_s[1] - took_s[0]:.2f} s with `--wait 2`")
    assert took_s[1] - took_s[0] < 3.0


def test_it_goes_on_when_a_replica_joins(fortress: Fortress, measured: Measured) -> None:
    numbers = [2, 2 + N_STAGES]

    async def use(client: Client) -> None:
        async def lose_all(completion: Completion) -> None:
            for number in numbers:
                fortress.mesh.listeners[number].running.process.kill()
                fortress.start_again(number)

        written = await write(client, request(wait_s=60.0), at_piece=MIDDLE, disturb=lose_all)
        assert written.text == fortress.text
        measured(f"goes on {written.longest_gap_s:.1f} s later, with the start of a listener")

    fortress.run(use)
    fortress.wait_whole()


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_data_process_that_dies(
    fortress: Fortress, measured: Measured, number: signal.Signals
) -> None:
    """SIGKILL is what the kernel sends when memory is short."""
    node = fortress.mesh.listeners[0]
    pid, before = node.running.process.pid, node.running.data_process().pid
    n_lines = len(node.running.lines)
    begun_s = time.monotonic()
    fortress.signal_data(node.peer_id, number)
    node.running.wait_line(rf"ended by {number.name}", 5, since=n_lines)
    noticed_s = time.monotonic() - begun_s
    node.running.wait_line(r"Shard 0 loaded", 30, since=n_lines)
    back_s = time.monotonic() - begun_s
    assert node.running.process.poll() is None
    assert psutil.pid_exists(pid)
    assert node.running.data_process().pid != before
    measured(f"{number.name}: started again after {noticed_s:.2f} s, serves after {back_s:.2f} s")
    assert noticed_s < 1.0
    fortress.wait_whole()


def test_a_node_stopped_for_thirty_seconds(fortress: Fortress, measured: Measured) -> None:
    stopped: list[psutil.Process] = []
    found: list[Written] = []

    async def use(client: Client) -> None:
        async def stop(completion: Completion) -> None:
            stopped.extend(fortress.processes(completion.chain.stages[1].peer_id))
            for process in stopped:
                process.suspend()

        begun_s = time.monotonic()
        found.append(await write(client, at_piece=MIDDLE, disturb=stop))
        await trio.sleep(max(0.0, 30.0 - (time.monotonic() - begun_s)))
        for process in stopped:
            process.resume()
        # Its late answers reach this client now, and must not matter to what is written next.
        again = await write(client)
        assert again.text == fortress.text

    try:
        fortress.run(use)
    finally:
        for process in stopped:
            if process.is_running():
                process.resume()
    (written,) = found
    assert written.text == fortress.text
    measured(f"text goes on after {written.longest_gap_s:.2f} s")
    fortress.wait_whole()
    assert written.longest_gap_s < 2.0
