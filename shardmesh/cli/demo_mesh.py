"""A whole mesh on this machine: a bootstrap and listeners as real processes, seen to their end."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from shardmesh.errors import OurError, UnreachableError
from shardmesh.swarm.cluster_files import ClusterFiles
from shardmesh.wire.cluster_secret import ClusterSecret

START_TIMEOUT_S = 120.0
"""For all processes to be up; a slow machine imports libp2p five times at once."""

STOP_TIMEOUT_S = 4.0
"""A node promises to be gone three seconds after SIGTERM."""

LOG_LINES_KEPT = 50
LOG_LINE_BYTES_MAX = 64 * 1024

STATES = (
    ("Peer ID", "starting"),
    ("LOADED BEFORE JOINING", "shard loaded"),
    ("Connecting to bootstrap", "joining"),
    ("Connection established", "connected"),
    ("Announced shard", "announced"),
    ("started! Waiting", "ready"),
)
"""A piece of a log line, and the state that it means, in order; a node never goes back."""


@dataclasses.dataclass(eq=False)
class DemoProcess:
    """One started node and what its log has said so far."""

    name: str
    arguments: Sequence[str]
    n_states_reached: int = 0
    lines: collections.deque[str] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=LOG_LINES_KEPT)
    )
    ready: trio.Event = dataclasses.field(default_factory=trio.Event)

    def note(self, line: str) -> None:
        """Takes in one line of the log."""
        try:
            message = str(json.loads(line)["message"])
        except (ValueError, KeyError, TypeError):
            message = line  # not of our logging: what a library or Python itself printed
        self.lines.append(message)
        for number, (piece, _) in enumerate(STATES):
            if piece in message:
                self.n_states_reached = max(self.n_states_reached, number)
        if self.state == "ready":
            self.ready.set()

    @property
    def state(self) -> str:
        return STATES[self.n_states_reached][1]


class DemoMesh:
    """The processes of a demo mesh; made by `start_mesh`."""

    def __init__(
        self, processes: Sequence[DemoProcess], bootstrap_address: str, secret: ClusterSecret
    ) -> None:
        self.processes = processes
        self.bootstrap_address = bootstrap_address
        self.secret = secret


def free_port() -> int:
    """A TCP port of loopback that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def threads_per_node(n_shards: int) -> int:
    """An even share of the cores but one: threads of llama.cpp spin, and frames must move."""
    return max(1, ((os.cpu_count() or 1) - 1) // n_shards)


OptionsOf = Callable[[int], Sequence[str]]
"""Flags of `shardmesh listen` for the listener of a shard."""


def no_options(shard_id: int) -> Sequence[str]:
    return ()


@asynccontextmanager
async def start_mesh(
    folder: Path,
    n_shards: int,
    *,
    cluster: str,
    on_change: Callable[[DemoMesh], None],
    n_threads: int | None = None,
    listen_options: Sequence[str] = (),
    options_of: OptionsOf = no_options,
) -> AsyncIterator[DemoMesh]:
    """A mesh that serves the shards in `folder`; all of it has ended when the block is left.

    `n_threads` of each stage, None for an even share of the cores; `listen_options` are further
    flags of `shardmesh listen`, `options_of` those of one listener.  Raises OurError with the last
    words of a process that died, UnreachableError (the moment's) when they are not up in time.
    """
    secret = ClusterFiles(folder / "state", cluster).make()  # all that are started find it there
    port = free_port()
    address = f"/ip4/127.0.0.1/tcp/{port}"
    common = ["--listen-addr", "127.0.0.1", "--cluster", cluster, "--log-format", "json"]
    common += ["--no-mdns"]  # nobody else is concerned
    common += ["--state-dir", str(folder / "state")]
    bootstrap = DemoProcess("bootstrap", ["bootstrap", "--port", str(port), *common])
    common += ["--bootstrap", address, "--shards-dir", str(folder / "shards")]
    common += ["--models-dir", str(folder / "models")]  # not what else lies on this disk
    common += ["--threads", str(n_threads or threads_per_node(n_shards)), *listen_options]
    listeners = [
        DemoProcess(
            f"listener {shard_id}",
            ["listen", "--shard-id", str(shard_id), *common, *options_of(shard_id)],
        )
        for shard_id in range(n_shards)
    ]
    mesh = DemoMesh([bootstrap, *listeners], address, secret)
    on_change(mesh)
    async with trio.open_nursery() as nursery:
        for process in mesh.processes:
            nursery.start_soon(_run_process, process, lambda: on_change(mesh))
        with trio.move_on_after(START_TIMEOUT_S) as scope:
            for process in mesh.processes:
                await process.ready.wait()
        if scope.cancelled_caught:
            late = ", ".join(p.name for p in mesh.processes if not p.ready.is_set())
            raise UnreachableError(f"not up after {START_TIMEOUT_S:.0f} s: {late}")
        yield mesh
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def start_process(node: DemoProcess) -> AsyncIterator[DemoProcess]:
    """One more node, which is up; it has ended when the block is left.

    Raises OurError with its last words if it dies, UnreachableError (the moment's) when it is not
    up in time.
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_run_process, node, lambda: None)
        with trio.move_on_after(START_TIMEOUT_S) as scope:
            await node.ready.wait()
        if scope.cancelled_caught:
            raise UnreachableError(f"not up after {START_TIMEOUT_S:.0f} s: {node.name}")
        yield node
        nursery.cancel_scope.cancel()


async def _run_process(node: DemoProcess, on_change: Callable[[], None]) -> None:
    """Runs one node until it is cancelled, then sees it out."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "shardmesh", *node.arguments],
        env=_without_admission(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        if process.stdout is not None:
            await _read_log(process.stdout, node, on_change)
        await process.wait()
    finally:
        with trio.CancelScope(shield=True):
            await _end(process)
    last_words = "\n  ".join(list(node.lines)[-5:])
    raise OurError(f"{node.name} ended by itself; its last words:\n  {last_words}")


def _without_admission(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables without those that would send a node into the mesh of its user."""
    names = {f"LLAMA_{name}" for name in ("SECRET", "SECRET_FILE", "PUBLIC", "ALLOW", "DENY")}
    return {name: value for name, value in environment.items() if name not in names}


async def _read_log(
    stream: trio.abc.ReceiveStream, node: DemoProcess, on_change: Callable[[], None]
) -> None:
    rest = b""
    async for data in stream:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            node.note(line.decode("utf-8", "replace"))
        rest = rest[-LOG_LINE_BYTES_MAX:]
        on_change()


async def _end(process: trio.Process) -> None:
    if process.returncode is None:
        process.terminate()
    with trio.move_on_after(STOP_TIMEOUT_S):
        await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()
    if process.stdout is not None:
        await process.stdout.aclose()
