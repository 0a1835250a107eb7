"""A mesh of real processes with two replicas of each of three stages, which is there to be harmed.

Every test that harms it leaves it complete, so that all of them can share it.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import trio
from support.asking import as_client, complete_with, wait_no_sessions, wait_status
from support.processes import Mesh, Node, start_bootstrap, workspace

from shardmesh.coordinator.client import Client
from shardmesh.coordinator.coordinator import Completion
from shardmesh.coordinator.generate import Piece
from shardmesh.coordinator.repairs import Repair
from shardmesh.coordinator.request import CompletionRequest
from shardmesh.engine.base import SamplingSettings
from shardmesh.errors import ungrouped

IS_FULL = os.environ.get("SHARDMESH_FAULTS") == "full"
"""Set by `make faults`: everything, instead of the share of `make test`."""

N_STAGES = 3
N_REPLICAS = 2
N_CTX = 1024
N_PARALLEL = 4
N_TOKENS = 60
WHOLE_AGAIN_S = 60.0
SAMPLING = SamplingSettings(temperature=0.9, repeat_penalty=1.2, seed=5)
LONG_PROMPT = "Once upon a time there was a king who went to the river and said: " * 15

Disturb = Callable[[Completion], Awaitable[None]]


@dataclasses.dataclass(frozen=True)
class Written:
    """What a generation has written, and how it went."""

    text: str
    repairs: tuple[Repair, ...]
    n_pieces: int
    longest_gap_s: float  # between two pieces of text


@dataclasses.dataclass
class Fortress:
    """The mesh; listener `n` is replica `n // N_STAGES` of stage `n % N_STAGES`."""

    mesh: Mesh
    text: str = ""  # what an undisturbed run of `request()` writes

    def node(self, peer_id: str) -> Node:
        return next(node for node in self.mesh.listeners if node.peer_id == peer_id)

    def number(self, peer_id: str) -> int:
        return self.mesh.listeners.index(self.node(peer_id))

    def start(self, number: int) -> Node:
        """Starts listener `number`, with the state of an earlier start if there was one."""
        state = str(self.mesh.space.folder / f"state-{number}")
        size = ("--ctx-size", str(N_CTX), "--parallel", str(N_PARALLEL))
        return self.mesh.listen(number % N_STAGES, *size, "--state-dir", state)

    def start_again(self, number: int) -> None:
        self.mesh.listeners[number] = self.start(number)

    def wait_whole(self) -> None:
        """Waits until all replicas serve and no stage holds a session."""
        peer_ids = [node.peer_id for node in self.mesh.listeners]
        wait_status(self.mesh, complete_with(*peer_ids), WHOLE_AGAIN_S)
        wait_no_sessions(self.mesh, WHOLE_AGAIN_S)

    def run(self, use: Callable[[Client], Awaitable[None]]) -> None:
        as_client(self.mesh, use)

    def processes(self, peer_id: str) -> list[psutil.Process]:
        """The control process of a listener and what it has started."""
        running = self.node(peer_id).running
        return [psutil.Process(running.process.pid), *running.children()]

    def signal_data(self, peer_id: str, number: int = signal.SIGKILL) -> None:
        """Sends a signal to the data process of a listener, if there is one right now."""
        for child in self.node(peer_id).running.children():
            child.send_signal(number)

    def kill_listener(self, peer_id: str) -> None:
        self.node(peer_id).running.process.kill()


@contextmanager
def built_fortress(model: Path) -> Iterator[Fortress]:
    """A fortress that is whole and has written its undisturbed text."""
    with workspace() as space:
        # A thread of OpenMP that spins while it waits takes the core of another process.
        space.environment = {**space.environment, "OMP_WAIT_POLICY": "passive"}
        shards_dir = space.folder / "shards"
        done = space.run("split", str(model), "--shards", str(N_STAGES), "--out", str(shards_dir))
        assert done.code == 0, done.err
        mesh = Mesh(space, "test", shards_dir, start_bootstrap(space, "test"))
        fortress = Fortress(mesh)
        mesh.listeners = [fortress.start(number) for number in range(N_STAGES * N_REPLICAS)]
        mesh.wait_ready()
        fortress.wait_whole()

        async def undisturbed(client: Client) -> None:
            written = await write(client)
            assert written.n_pieces > N_TOKENS // 2
            assert not written.repairs
            fortress.text = written.text

        fortress.run(undisturbed)
        yield fortress


def request(
    prompt: str = LONG_PROMPT, *, n_tokens: int = N_TOKENS, seed: int = 5, wait_s: float = 30.0
) -> CompletionRequest:
    return CompletionRequest(
        prompt=prompt,
        n_tokens_max=n_tokens,
        sampling=dataclasses.replace(SAMPLING, seed=seed),
        ignore_end=True,
        wait_s=wait_s,
    )


async def write(
    client: Client,
    asked: CompletionRequest | None = None,
    *,
    in_prefill: Disturb | None = None,
    at_piece: int = -1,
    disturb: Disturb | None = None,
) -> Written:
    """Writes a text; `in_prefill` is called while the prompt is under way, `disturb` at a piece."""
    text, n_pieces, longest_gap_s, last_s = "", 0, 0.0, float("inf")
    with ungrouped():
        async with (
            client.coordinator.complete(asked or request()) as completion,
            trio.open_nursery() as nursery,
        ):
            if in_prefill is not None:
                nursery.start_soon(_when_prompt_is_under_way, completion, in_prefill)
            async for item in completion.items:
                if not isinstance(item, Piece):
                    continue
                now_s = time.monotonic()
                longest_gap_s, last_s = max(longest_gap_s, now_s - last_s), now_s
                text, n_pieces = text + item.text, n_pieces + 1
                if disturb is not None and n_pieces == at_piece:
                    await disturb(completion)
            nursery.cancel_scope.cancel()
            return Written(text, tuple(completion.repairs), n_pieces, longest_gap_s)


async def _when_prompt_is_under_way(completion: Completion, disturb: Disturb) -> None:
    # One piece is through, eight are under way.
    while completion.session.n_sent < 9 * 32:  # noqa: ASYNC110 - nobody tells of it
        await trio.sleep(0.001)
    await disturb(completion)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least that share of all values does not exceed."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
