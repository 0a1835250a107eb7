"""The console's line for the next machine: copied, and run where nothing of the model is."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import trio
from support.processes import Finished, Mesh, Workspace, start_bootstrap, workspace

from benchmarks.websocket import open_onlooker
from shardmesh.demo_model import DEMO_MODEL
from shardmesh.web.state import merged

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.skipif(not DEMO_MODEL.exists(), reason="the demo model is not here"),
]

START_TIMEOUT_S = 60.0


async def run(space: Workspace, *arguments: str) -> None:
    done: Finished = await trio.to_thread.run_sync(lambda: space.run(*arguments))
    assert done.code == 0, done.err


async def state_with_a_link(port: int) -> dict[str, Any]:
    """The console's document once the model's link is in it."""
    onlooker = await open_onlooker(port)
    document: dict[str, Any] = {}
    while not any("link" in model for model in document.get("models", {}).values()):
        message = await onlooker.next()
        document = merged(document, message.get("state") or message.get("patch") or {})
    await onlooker.aclose()
    return document


async def test_the_line_to_join_is_one_that_works() -> None:
    with workspace() as space:
        shards = space.folder / "shards"
        state = ("--state-dir", str(space.folder / "state"))
        await run(space, "split", str(DEMO_MODEL), "--shards", "2", "--out", str(shards))
        mesh = Mesh(space, "test", shards, start_bootstrap(space, "test"))
        await run(space, "publish", str(shards), "--no-seed", *mesh.member, *state)
        mesh.listen(0)
        web = space.start("web", *mesh.where, *state, "--port", "0", "--ws-port", "0")
        port = int(web.wait_line(r"WebSocket on ws://127.0.0.1:(\d+)/", START_TIMEOUT_S)[1])
        document = await state_with_a_link(port)
        (model,) = document["models"].values()
        assert document["needed"]["shard_id"] == 1

        # As `static/js/join.js` puts it together.
        line = f"{document['gateway']['join_by_link']} --shard-id 1 --model '{model['link']}'"
        (space.folder / "cluster.secret").write_text(space.secret.text())
        (space.folder / "cluster.secret").chmod(0o600)
        program, *arguments = shlex.split(line)
        assert program == "shardmesh"
        elsewhere = ("--state-dir", str(space.folder / "other"), "--listen-addr", "127.0.0.1")
        joined = space.start(*arguments, *elsewhere)
        joined.wait_line(r"Shard 1 loaded", START_TIMEOUT_S)
