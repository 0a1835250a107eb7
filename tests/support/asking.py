"""Questions to a mesh of processes from the test's own process: a client without a start-up."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio
from support.processes import Mesh

from shardmesh.coordinator.client import Client, open_client
from shardmesh.coordinator.overview import ModelView, look_at_mesh
from shardmesh.swarm.admission import Admission
from shardmesh.swarm.commands import send_command

Result = TypeVar("Result")

ANSWER_TIMEOUT_S = 10.0


def as_client(mesh: Mesh, use: Callable[[Client], Awaitable[Result]]) -> Result:
    """Joins the mesh as a client for as long as `use` takes."""

    async def run() -> Result:
        async with open_client(
            bootstraps=[mesh.bootstrap.address],
            cluster=mesh.cluster,
            admission=Admission(mesh.space.secret),
            shards_dir=mesh.shards_dir,
            cache_dir=mesh.space.folder / "cache",
        ) as client:
            return await use(client)

    return trio.run(run)


def ask(mesh: Mesh, command: str, params: object = None) -> list[Any]:
    """The answers of all listeners of the mesh, in their order."""

    async def use(client: Client) -> list[Any]:
        await client.membership.find_listeners()
        return [
            await send_command(client.host, node.peer_id, command, params, ANSWER_TIMEOUT_S)
            for node in mesh.listeners
        ]

    return as_client(mesh, use)


def wait_status(
    mesh: Mesh, is_right: Callable[[tuple[ModelView, ...]], bool], timeout_s: float = 10.0
) -> tuple[ModelView, ...]:
    """What `shardmesh status` would say, asked until it is right or the time is over."""

    async def use(client: Client) -> tuple[ModelView, ...]:
        models: tuple[ModelView, ...] = ()
        with trio.move_on_after(timeout_s):
            while True:
                models = await look_at_mesh(client.host, await client.membership.find_listeners())
                if is_right(models):
                    break
                await trio.sleep(0.1)  # there is nothing to wait for but the next question
        return models

    models = as_client(mesh, use)
    assert is_right(models), f"not right after {timeout_s:.0f} s: {models}"
    return models


def wait_no_sessions(mesh: Mesh, timeout_s: float = 3.0) -> None:
    """Waits until no stage holds a session."""
    deadline_s = time.monotonic() + timeout_s
    while any(answer["n_sessions"] for answer in ask(mesh, "GET_METRICS")):
        assert time.monotonic() < deadline_s, "a stage still holds a session"


def complete_with(*peer_ids: str) -> Callable[[tuple[ModelView, ...]], bool]:
    """Whether there is one model, complete, with exactly these replicas."""

    def is_right(models: tuple[ModelView, ...]) -> bool:
        return (
            len(models) == 1
            and models[0].is_complete
            and {replica.peer_id for replica in models[0].replicas} == set(peer_ids)
        )

    return is_right
