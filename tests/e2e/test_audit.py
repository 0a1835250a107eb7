"""A node that computes something else is found by audits, with real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from support.processes import Mesh, Node, Workspace, start_bootstrap
from support.reference import N_TOKENS, PROMPT, Reference

from shardmesh.coordinator.audit import AuditReport
from shardmesh.coordinator.client import open_client
from shardmesh.coordinator.coordinator import Coordinator
from shardmesh.coordinator.generate import Piece
from shardmesh.coordinator.request import CompletionRequest
from shardmesh.engine.base import SamplingSettings
from shardmesh.swarm.admission import Admission

pytestmark = [pytest.mark.processes, pytest.mark.slow]

N_TRIES_MAX = 30  # each of them finds the liar with a chance of two thirds
LIE = """
import sys
if "shardmesh.listener.data_process" in sys.orig_argv:
    import msgspec
    from shardmesh.engine.llama import LlamaEngine
    compute = LlamaEngine.compute

    def lie(self, batches):
        given = compute(self, batches)
        return [msgspec.structs.replace(each, hidden=each.hidden * 1.5) for each in given]

    LlamaEngine.compute = lie
"""
"""Runs before anything else in the liar's processes: its hidden states are half as large again."""


@pytest.fixture
def replicated(space: Workspace, model: Path) -> tuple[Mesh, Node]:
    """Two honest replicas of shard 0 and one that lies, one of shard 1; and the liar."""
    shards_dir = space.folder / "two"
    done = space.run("split", str(model), "--shards", "2", "--out", str(shards_dir))
    assert done.code == 0, done.err
    mesh = Mesh(space, "audited", shards_dir, start_bootstrap(space, "audited"))
    for number, shard_id in enumerate((0, 0, 1)):
        state = ("--state-dir", str(space.folder / f"state-{number}"))
        mesh.listeners.append(mesh.listen(shard_id, *state))
    lies = space.folder / "lies"
    lies.mkdir()
    (lies / "sitecustomize.py").write_text(LIE)
    path = f"{lies}:{space.environment.get('PYTHONPATH', '')}"
    options = ("--state-dir", str(space.folder / "state-liar"), "--listen-addr", "127.0.0.1")
    liar = Node(
        space.start(
            *("listen", "--shard-id", "0", *mesh.where, *options, "--threads", "1"),
            variables={"PYTHONPATH": path},
        )
    )
    mesh.listeners.append(liar)
    mesh.wait_ready()
    return mesh, liar


async def write(coordinator: Coordinator) -> tuple[str, list[str]]:
    """A text, and the peer ids of its chain."""
    request = CompletionRequest(
        prompt=PROMPT, n_tokens_max=N_TOKENS, sampling=SamplingSettings(temperature=0.0)
    )
    async with coordinator.complete(request) as completion:
        items = [item async for item in completion.items]
        chain = [stage.peer_id for stage in completion.chain.stages]
    return "".join(item.text for item in items if isinstance(item, Piece)), chain


def test_a_liar_among_three_is_found_and_left_alone(
    replicated: tuple[Mesh, Node], references: dict[str, Reference]
) -> None:
    mesh, liar = replicated
    reports: list[AuditReport] = []

    async def use() -> None:
        async with open_client(
            bootstraps=[mesh.bootstrap.address],
            cluster=mesh.cluster,
            admission=Admission(mesh.space.secret),
            shards_dir=mesh.shards_dir,
            cache_dir=mesh.space.folder / "cache",
            audit_rate=1.0,
        ) as client:
            coordinator = client.coordinator
            coordinator.auditor.tell(reports.append)
            for _ in range(N_TRIES_MAX):
                text, chain = await write(coordinator)
                assert (text == references[PROMPT].text) is (liar.peer_id not in chain)
                await coordinator.auditor.wait_idle()
                if reports and reports[-1].outcome == "differs":
                    break
            for _ in range(4):
                text, chain = await write(coordinator)
                assert text == references[PROMPT].text
                assert liar.peer_id not in chain
                await coordinator.auditor.wait_idle()

    trio.run(use)
    differing = [report for report in reports if report.outcome != "same"]
    assert [report.suspects for report in differing] == [(liar.peer_id,)]
    assert (differing[0].layer_start, differing[0].n_tokens) == (0, N_TOKENS)
    answered = mesh.space.run("run", PROMPT, "--max-tokens", "3", "--audit", "1", *mesh.where)
    assert answered.code == 0, answered.err
    assert "audit: " in answered.err
    alone = mesh.space.run(
        *("run", PROMPT, "--max-tokens", "3", "--audit", "1", *mesh.where),
        *("--via", mesh.listeners[0].peer_id),
    )
    assert "no other replica that computes alike" in alone.err
