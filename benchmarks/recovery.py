"""`recovery`: the pause when a stage is killed in a text, by the length of its context.

Two stages with two replicas each.  The data process that serves the second one is killed with -9
behind some tokens; its replica computes half of the layers again from the hidden states that the
first stage has kept.  Beside it the time to the first token of the same prompt: what it would cost
to begin anew, with all layers.  Then the same where that replica stands by with a copy of the KV,
beside the pause without; and what copying costs a token while nothing happens.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import psutil
import trio

from benchmarks.generation import GREEDY, N_THREADS
from benchmarks.mesh import CLUSTER, split
from benchmarks.results import Result, median_of, paired
from shardmesh.cli.demo_mesh import DemoProcess, start_mesh, start_process
from shardmesh.coordinator.client import Client, open_client
from shardmesh.coordinator.generate import Finished, Piece
from shardmesh.coordinator.request import CompletionRequest
from shardmesh.errors import OurError
from shardmesh.swarm.admission import Admission
from shardmesh.swarm.identity import load_identity

CONTEXTS: Final = (256, 1024, 4096)
N_TOKENS: Final = 16
KILLED_BEHIND: Final = 8
COPIED_CONTEXT: Final = 1024
COPIED_TOKENS: Final = 256
N_SHARDS: Final = 2
KILLED_SHARD: Final = 1
TIMEOUT_S: Final = 300.0


async def measure_recovery(
    model: Path, *, runs: int, progress: Callable[[str], None]
) -> list[Result]:
    """Seconds from noticing the death to the next token, for each length of context."""
    with tempfile.TemporaryDirectory(prefix="shardmesh-bench-") as name:
        folder = Path(name)
        progress("cutting the model")
        await trio.to_thread.run_sync(split, model, N_SHARDS, folder)
        progress("starting the mesh")
        async with AsyncExitStack() as stack:
            mesh = await _Mesh.open(stack, folder)
            results = []
            for n_context in CONTEXTS:
                pauses, prefills, standby_pauses = list[float](), list[float](), list[float]()
                for run in range(runs + 1):
                    progress(f"{n_context} tokens, run {run} of {runs}")
                    pause_s, first_s = await mesh.kill_in_a_text(n_context)
                    pauses.append(pause_s)
                    prefills.append(first_s)
                    progress(f"{n_context} tokens with a standby, run {run} of {runs}")
                    pause_s, _ = await mesh.kill_in_a_text(n_context, standby=True)
                    standby_pauses.append(pause_s)
                name = f"recovery of {n_context} tokens"
                results.append(_compared(name, pauses, prefills))
                results.append(_compared(f"{name} by a standby", standby_pauses, pauses))
            results.append(await _cost_of_copying(mesh, runs, progress))
    return results


async def _cost_of_copying(mesh: _Mesh, runs: int, progress: Callable[[str], None]) -> Result:
    """Milliseconds of a token with standbys, beside one without."""
    plain, copied = list[float](), list[float]()
    for run in range(runs + 1):
        progress(f"tokens with and without standbys, run {run} of {runs}")
        plain.append(await mesh.token_ms(standby=False))
        copied.append(await mesh.token_ms(standby=True))
    return _compared("a token with a standby", copied, plain, unit="ms")


def _compared(
    name: str, values: Sequence[float], baseline: Sequence[float], unit: str = "s"
) -> Result:
    """Without the first run, which warms up."""
    ratio, pairs = paired(values[1:], baseline[1:])
    return Result(
        name=name,
        mesh={**median_of(values[1:], unit), "pair_ratios": pairs},
        baseline=median_of(baseline[1:], unit),
        runs=len(values) - 1,
        ratio=ratio,
    )


class _Mesh:
    """The mesh, a client, and where the replicas keep their keys."""

    def __init__(self, client: Client, state_dirs: Sequence[Path]) -> None:
        self._client = client
        self._peer_ids = {
            (shard_id, folder): load_identity(folder / f"shard-{shard_id}" / "node.key").peer_id
            for shard_id in range(N_SHARDS)
            for folder in state_dirs
        }
        victims = [(self._peer_ids[KILLED_SHARD, folder], folder) for folder in state_dirs]
        self._victims = itertools.cycle(victims)

    @classmethod
    async def open(cls, stack: AsyncExitStack, folder: Path) -> _Mesh:
        options = ("--ctx-size", str(max(CONTEXTS) + N_TOKENS), "--parallel", "1")
        mesh = await stack.enter_async_context(
            start_mesh(
                folder,
                N_SHARDS,
                cluster=CLUSTER,
                on_change=lambda mesh: None,
                n_threads=N_THREADS,
                listen_options=options,
            )
        )
        for shard_id in range(N_SHARDS):
            arguments = (
                *("listen", "--shard-id", str(shard_id), "--shards-dir", str(folder / "shards")),
                *("--models-dir", str(folder / "models"), "--state-dir", str(folder / "other")),
                *("--bootstrap", mesh.bootstrap_address, "--cluster", CLUSTER),
                *("--secret", mesh.secret.text(), "--listen-addr", "127.0.0.1", "--no-mdns"),
                *("--log-format", "json", "--threads", str(N_THREADS), *options),
            )
            other = DemoProcess(f"other replica of shard {shard_id}", arguments)
            await stack.enter_async_context(start_process(other))
        client = await stack.enter_async_context(
            open_client(
                bootstraps=[mesh.bootstrap_address],
                cluster=CLUSTER,
                admission=Admission(mesh.secret),
                shards_dir=folder / "shards",
                cache_dir=folder / "cache",
            )
        )
        return cls(client, (folder / "state", folder / "other"))

    async def token_ms(self, *, standby: bool) -> float:
        """Milliseconds of a token behind a long prompt, of a stage that is copied or not."""
        await self._wait_served()
        request = dataclasses.replace(_request(COPIED_CONTEXT, standby), n_tokens_max=COPIED_TOKENS)
        async with self._client.coordinator.complete(request) as completion:
            async for item in completion.items:
                if isinstance(item, Finished) and item.timings.decode_tokens_per_s:
                    if standby and len(completion.standbys) < N_SHARDS:
                        raise OurError("a stage had no standby")
                    return 1e3 / item.timings.decode_tokens_per_s
        raise OurError("a generation ended without its last item")

    async def kill_in_a_text(self, n_context: int, *, standby: bool = False) -> tuple[float, float]:
        """The pause of a text whose second stage is killed, and the time to its first token."""
        victim, state_dir = next(self._victims)
        await self._wait_served()
        request = dataclasses.replace(_request(n_context - KILLED_BEHIND, standby), via=(victim,))
        n_pieces = 0
        async with self._client.coordinator.complete(request) as completion:
            async for item in completion.items:
                if isinstance(item, Finished):
                    repairs = completion.repairs
                    if [repair.lost_peer_id for repair in repairs] != [victim]:
                        raise OurError(f"{len(repairs)} stages were replaced, one was killed")
                    return repairs[0].pause_s, item.timings.first_token_s
                if isinstance(item, Piece) and item.token is not None:
                    n_pieces += 1
                    if n_pieces == KILLED_BEHIND:
                        _data_process(state_dir).kill()
        raise OurError("a generation ended without its last item")

    async def _wait_served(self) -> None:
        """All replicas serve: the one that was killed before has been started again."""
        directory = self._client.directory
        with trio.fail_after(TIMEOUT_S):
            while True:
                version = directory.version
                loaded = {a.peer_id for a in directory.all() if a.capabilities.shard_loaded}
                if loaded >= set(self._peer_ids.values()):
                    return
                await directory.wait_changed(version)


def _request(n_prompt: int, standby: bool) -> CompletionRequest:
    return CompletionRequest(
        prompt_tokens=tuple(10 + i % 200 for i in range(n_prompt)),
        n_tokens_max=N_TOKENS,
        sampling=GREEDY,
        ignore_end=True,
        reuse_prefix=False,
        standby=standby,
        n_drafts=0,
    )


def _data_process(state_dir: Path) -> psutil.Process:
    """The data process of the listener of the killed shard in this state folder."""
    wanted = ["--shard-id", str(KILLED_SHARD)]
    for listener in psutil.Process().children():
        words = listener.cmdline()
        if "listen" in words and str(state_dir) in words and wanted[1] in words:
            at = words.index(wanted[0])
            data = [c for c in listener.children() if any("data_process" in w for w in c.cmdline())]
            if words[at : at + 2] == wanted and data:
                return data[0]
    raise OurError(f"no data process of {state_dir} is running")
