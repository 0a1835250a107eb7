"""A coordinator is killed in the middle of a text; another process goes on with its tokens."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import support.token_writer
from support.asking import as_client, wait_no_sessions
from support.processes import Workspace, start_mesh

from shardmesh.coordinator.client import Client
from shardmesh.coordinator.generate import Piece

pytestmark = [pytest.mark.processes, pytest.mark.slow]

PROMPT = "Once upon a time there was a king who"
N_TOKENS = 200
N_BEFORE_DEATH = 20
FREE_WITHIN_S = 30.0


def test_the_same_text_with_another_coordinator(space: Workspace, shards_dir: Path) -> None:
    n_shards = len(list(shards_dir.glob("shard-*.gguf")))
    mesh = start_mesh(space, shards_dir, n_shards, "--ctx-size", "512")
    where = {
        "bootstrap": mesh.bootstrap.address,
        "cluster": mesh.cluster,
        "shards_dir": str(shards_dir),
        "cache_dir": str(space.folder / "cache"),
    }
    program = [sys.executable, support.token_writer.__file__, json.dumps(where)]
    with subprocess.Popen(
        [*program, PROMPT, str(N_TOKENS)],
        stdout=subprocess.PIPE,
        env=space.environment,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        begun = [int(writer.stdout.readline()) for _ in range(N_BEFORE_DEATH)]
        writer.kill()
    wait_no_sessions(mesh, FREE_WITHIN_S)
    request = support.token_writer.request(PROMPT, N_TOKENS)

    async def tokens_of(client: Client, given: tuple[int, ...]) -> list[int]:
        asked = dataclasses.replace(request, given=given)
        async with client.coordinator.complete(asked) as completion:
            items = [item async for item in completion.items]
        return [i.token.token for i in items if isinstance(i, Piece) and i.token is not None]

    async def use(client: Client) -> tuple[list[int], list[int]]:
        return await tokens_of(client, ()), await tokens_of(client, tuple(begun))

    whole, rest = as_client(mesh, use)
    assert begun == whole[:N_BEFORE_DEATH]
    assert begun + rest == whole
    assert len(whole) == N_TOKENS
