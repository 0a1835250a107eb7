"""A thousand sessions at once on a mesh that has room for four: served, or told so at once."""

from __future__ import annotations

import time

import pytest
import trio
from faults.conftest import Measured
from faults.fortress import IS_FULL, N_PARALLEL, Fortress, percentile, request, write

from shardmesh.coordinator.client import Client
from shardmesh.errors import BusyError
from shardmesh.settling import settle_memory

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(600)]

N_SESSIONS = 1000
N_TOKENS = 20
ANSWER_TARGET_S = 0.1
BETWEEN_S = 0.004  # a coordinator prepares and opens no more than that in one process


def test_a_thousand_sessions(fortress: Fortress, measured: Measured) -> None:
    """As fast as one coordinator can ask; nobody waits for those before, and no text is mixed."""
    served_s: list[float] = []
    busy_s: list[float] = []
    texts: dict[int, str] = {}

    def asked_by(number: int):  # type: ignore[no-untyped-def]
        return request(f"{number} kings went to the river and", n_tokens=N_TOKENS, seed=number)

    async def use(client: Client) -> None:
        await write(client)  # the links are up, the tokenizer is open
        settle_memory()  # as commands do: the test's own process has still more objects

        async def one(number: int) -> None:
            begun_s = time.monotonic()
            try:
                async with client.coordinator.complete(asked_by(number)) as completion:
                    served_s.append(time.monotonic() - begun_s)
                    texts[number] = "".join(
                        [getattr(item, "text", "") async for item in completion.items]
                    )
            except BusyError:
                busy_s.append(time.monotonic() - begun_s)

        async with trio.open_nursery() as nursery:
            for number in range(N_SESSIONS):
                nursery.start_soon(one, number)
                await trio.sleep(BETWEEN_S)
        assert client.coordinator.n_sessions == 0
        assert len(texts) == len(served_s)
        assert len(served_s) + len(busy_s) == N_SESSIONS
        assert len(texts) >= N_PARALLEL
        for number in list(texts)[:: 1 if IS_FULL else 8]:
            assert (await write(client, asked_by(number))).text == texts[number]

    fortress.run(use)
    answers_s = served_s + busy_s
    worst_s = percentile(answers_s, 0.99)
    measured(
        f"{len(served_s)} served, p50 {1e3 * percentile(served_s, 0.5):.0f} ms, "
        f"{len(busy_s)} told BUSY, p99 {1e3 * percentile(busy_s, 0.99):.0f} ms; "
        f"all: p50 {1e3 * percentile(answers_s, 0.5):.0f} ms, p99 {1e3 * worst_s:.0f} ms"
    )
    fortress.wait_whole()
    if IS_FULL:  # a figure of a quiet machine
        assert worst_s < ANSWER_TARGET_S
