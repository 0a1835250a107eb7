"""Two thousand short requests, sixteen at once: none is lost, mixed up or leaves anything."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from support.asking import as_client, ask, wait_no_sessions
from support.processes import Mesh, start_mesh, workspace

from shardmesh.coordinator.client import Client
from shardmesh.coordinator.generate import Piece
from shardmesh.coordinator.request import CompletionRequest
from shardmesh.engine.base import SamplingSettings

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(900)]

N_STAGES = 3
N_REQUESTS = 2000
N_WARM = 400  # what grows until then are caches of a fixed size
N_AT_ONCE = 16
N_KINDS = 40
GROWTH_BYTES_MAX = 8 << 20  # of one process over the 1,600 requests after that: 5 KB for each


def kind(number: int) -> CompletionRequest:
    """One of the different requests: prompts of one or more pieces, greedy and sampled."""
    return CompletionRequest(
        prompt=f"{number} kings went to the river " * (1 + number % 7),
        n_tokens_max=1 + number % 12,
        sampling=SamplingSettings(temperature=0.8 * (number % 2), seed=number),
        ignore_end=True,
    )


@pytest.fixture
def mesh(model: Path) -> Iterator[Mesh]:
    with workspace() as space:
        folder = space.folder / "shards"
        done = space.run("split", str(model), "--shards", str(N_STAGES), "--out", str(folder))
        assert done.code == 0, done.err
        size = ("--ctx-size", "256", "--parallel", str(N_AT_ONCE))
        yield start_mesh(space, folder, N_STAGES, *size)


async def written(client: Client, number: int) -> tuple[str, int]:
    """The text of a request and how many tokens it has."""
    async with client.coordinator.complete(kind(number)) as completion:
        pieces = [item async for item in completion.items if isinstance(item, Piece)]
    n_tokens = sum(piece.token is not None for piece in pieces)
    return "".join(piece.text for piece in pieces), n_tokens


def memory_bytes(mesh: Mesh) -> list[int]:
    """The resident memory of every control and data process."""
    answers = ask(mesh, "GET_METRICS")
    return [a[name] for a in answers for name in ("control_memory_bytes", "data_memory_bytes")]


def ask_many(mesh: Mesh, alone: dict[int, tuple[str, int]], n_requests: int) -> None:
    """Sixteen of them at a time, in any order; each must be what it is alone."""
    numbers = [number % N_KINDS for number in range(n_requests)]
    random.Random(n_requests).shuffle(numbers)
    answered = 0

    async def use(client: Client) -> None:
        async def worker() -> None:
            nonlocal answered
            while numbers:
                number = numbers.pop()
                assert await written(client, number) == alone[number]
                answered += 1

        async with trio.open_nursery() as nursery:
            for _ in range(N_AT_ONCE):
                nursery.start_soon(worker)

    as_client(mesh, use)
    assert answered == n_requests


def test_a_soak_of_two_thousand_requests(mesh: Mesh, record_property: Any) -> None:
    async def one_by_one(client: Client) -> dict[int, tuple[str, int]]:
        return {number: await written(client, number) for number in range(N_KINDS)}

    alone = as_client(mesh, one_by_one)
    assert all(n_tokens == kind(number).n_tokens_max for number, (_, n_tokens) in alone.items())
    ask_many(mesh, alone, N_WARM)
    wait_no_sessions(mesh)
    before = memory_bytes(mesh)
    ask_many(mesh, alone, N_REQUESTS - N_WARM)
    wait_no_sessions(mesh)
    growth = [now - then for now, then in zip(memory_bytes(mesh), before, strict=True)]
    record_property("growth_bytes", growth)
    for answer in ask(mesh, "GET_METRICS"):
        assert answer["stage"]["n_kv_tokens"] == 0
        assert answer["stage"]["n_sessions_failed"] == answer["stage"]["n_sessions_refused"] == 0
        assert answer["stage"]["n_sessions_opened"] == N_KINDS + N_REQUESTS, "one was repaired"
        assert answer["n_data_process_restarts"] == 0
    assert max(growth) < GROWTH_BYTES_MAX, growth
