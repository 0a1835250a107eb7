"""`--rpc`: the same work by llama.cpp's own way over several machines, its RPC backend.

Servers on loopback with one thread each hold the layers; llama.cpp's own benchmarks ask them, and
ask one process that has the whole model, in turn.  The ratio is what RPC loses or gains, so it
stands beside the mesh's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from benchmarks.generation import N_THREADS
from benchmarks.many import N_SESSIONS, N_TOKENS
from benchmarks.results import Result, median_of, paired
from shardmesh.errors import InputError, UnreachableError

SERVER: Final = "ggml-rpc-server"
SERVER_START_TIMEOUT_S: Final = 20.0
RUN_TIMEOUT_S: Final = 600.0
N_GPU_LAYERS_ALL: Final = 99
"""RPC servers count as graphics processors to llama.cpp: all layers go to them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """One of the mesh's benchmarks, as llama.cpp's programs know it."""

    n_servers: int
    program: str
    options: tuple[str, ...]
    tokens_per_s: Callable[[str], float]  # out of what the program prints


def _of_llama_bench(printed: str) -> float:
    (entry,) = json.loads(printed)
    return float(entry["avg_ts"])


def _of_batched_bench(printed: str) -> float:
    (line,) = [line for line in printed.splitlines() if line.startswith("{")]
    return float(json.loads(line)["speed_tg"])


WORKS: Final[dict[str, Work]] = {
    "decode": Work(
        n_servers=4,
        program="llama-bench",
        options=("-p", "0", "-n", "128", "-r", "1", "-o", "json"),
        tokens_per_s=_of_llama_bench,
    ),
    "prefill": Work(
        n_servers=2,
        program="llama-bench",
        options=("-p", "2048", "-n", "0", "-r", "1", "-o", "json"),
        tokens_per_s=_of_llama_bench,
    ),
    "aggregate": Work(
        n_servers=2,
        program="llama-batched-bench",
        options=(
            *("-c", "4096", "-npp", "8", "-ntg", str(N_TOKENS), "-npl", str(N_SESSIONS)),
            *("--output-format", "jsonl"),
        ),
        tokens_per_s=_of_batched_bench,
    ),
}


async def measure_rpc(
    name: str, model: Path, *, runs: int, progress: Callable[[str], None]
) -> Result:
    """One of WORKS; raises InputError (theirs) if llama.cpp's programs are not on the PATH."""
    work = WORKS[name]
    program = _found(work.program)
    common: list[str | Path] = [program, "-m", model, "-t", str(N_THREADS), *work.options]
    alone: list[float] = []
    together: list[float] = []
    async with _open_servers(_found(SERVER), work.n_servers) as addresses:
        remote = ["--rpc", ",".join(addresses), "-ngl", str(N_GPU_LAYERS_ALL)]
        for number in range(runs + 1):
            progress(f"pair {number} of {runs}" if number else "warming up")
            alone.append(work.tokens_per_s(await _printed(common)))
            together.append(work.tokens_per_s(await _printed([*common, *remote])))
    ratio, pairs = paired(together[1:], alone[1:])
    return Result(
        name=f"{name}-rpc",
        mesh={
            **median_of(together[1:], "tokens_per_s"),
            "pair_ratios": pairs,
            "n_servers": work.n_servers,
        },
        baseline=median_of(alone[1:], "tokens_per_s"),
        runs=runs,
        ratio=ratio,
    )


def _found(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise InputError(
            f"{program} is not on the PATH",
            code="NO_PROGRAM",
            next_step="build llama.cpp with GGML_RPC and put its programs there, or omit --rpc",
        )
    return path


async def _printed(command: Sequence[str | Path]) -> str:
    with trio.fail_after(RUN_TIMEOUT_S):
        ended = await trio.run_process(
            command, capture_stdout=True, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        )
    return ended.stdout.decode()


@asynccontextmanager
async def _open_servers(program: str, n_servers: int) -> AsyncIterator[list[str]]:
    """Addresses of servers that listen; they are gone when the block is left."""
    ports = _free_ports(n_servers)
    async with trio.open_nursery() as nursery:
        for port in ports:
            command = [program, "-H", "127.0.0.1", "-p", str(port), "-t", str(N_THREADS)]
            nursery.start_soon(
                functools.partial(
                    trio.run_process,
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
        for port in ports:
            await _wait_until_it_listens(port)
        yield [f"127.0.0.1:{port}" for port in ports]
        nursery.cancel_scope.cancel()


def _free_ports(n_ports: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n_ports)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


async def _wait_until_it_listens(port: int) -> None:
    with trio.move_on_after(SERVER_START_TIMEOUT_S):
        while True:
            try:
                stream = await trio.open_tcp_stream("127.0.0.1", port)
            except OSError:
                await trio.sleep(0.1)
            else:
                await stream.aclose()
                return
    raise UnreachableError(f"{SERVER} did not listen within {SERVER_START_TIMEOUT_S:g} s")
