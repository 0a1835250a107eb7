"""A listener that was told no shard takes the place of one that died, with real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.asking import wait_status
from support.processes import START_TIMEOUT_S, Mesh, Workspace, start_bootstrap
from support.reference import N_TOKENS, PROMPT, Reference

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.recovery]

N_SHARDS = 3
QUICKLY = ("--rebalance-interval", "2", "--refresh-interval", "2")
MOVE_TIMEOUT_S = 90.0


def test_a_spare_replica_serves_what_a_dead_node_has_served(
    space: Workspace, model: Path, references: dict[str, Reference]
) -> None:
    shards_dir = space.folder / "shards"
    done = space.run("split", str(model), "--shards", str(N_SHARDS), "--out", str(shards_dir))
    assert done.code == 0, done.err
    mesh = Mesh(space, "moving", shards_dir, start_bootstrap(space, "moving"))
    told = [mesh.listen(shard_id) for shard_id in (0, 1)]
    for node in told:
        node.wait_announced()
    mesh.listeners = told
    # Nobody told these two: the first takes what is missing, the second one more of shard 0.
    for shard_id in (2, 0):
        state = ("--state-dir", str(space.folder / f"own-{shard_id}"))
        node = mesh.listen(None, *QUICKLY, *state)
        node.running.wait_line(rf"Chosen: shard {shard_id}", START_TIMEOUT_S)
        node.wait_announced()
        mesh.listeners.append(node)
    spare = mesh.listeners[3]
    told[1].running.process.kill()
    spare.running.wait_line("Shard 1 needs this node more: leaving shard 0", MOVE_TIMEOUT_S)
    spare.running.wait_line("Moved from shard 0 to shard 1", MOVE_TIMEOUT_S)
    expected = {told[0].peer_id: 0, mesh.listeners[2].peer_id: 2, spare.peer_id: 1}
    wait_status(
        mesh,
        lambda models: (
            len(models) == 1
            and {r.peer_id: r.shard_id for r in models[0].replicas if r.state == "loaded"}
            == expected
        ),
    )
    options = ("--temperature", "0", "--max-tokens", str(N_TOKENS), *mesh.where)
    answered = space.run("run", PROMPT, *options)
    assert (answered.code, answered.out) == (0, references[PROMPT].text + "\n"), answered.err
    # Everybody is the last one of a shard now: nobody moves any more.
    assert not any("needs this node more" in line for line in mesh.listeners[2].running.lines)
