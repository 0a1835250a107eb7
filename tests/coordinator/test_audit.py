"""Audits over fake engines: who computes something else is found, and nobody else is blamed."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import numpy as np
import pytest
import trio
from support.mesh import COORDINATOR, PIECE_TOKENS, RANDOM, MemoryMesh, memory_mesh

from shardmesh.coordinator.audit import (
    AuditReport,
    Outcome,
    Results,
    Transcript,
    audit,
    auditable,
    recompute,
)
from shardmesh.coordinator.auditor import Auditor
from shardmesh.coordinator.chain import Chain, Replica
from shardmesh.coordinator.generate import prefill
from shardmesh.coordinator.openings import SessionSettings
from shardmesh.coordinator.replacements import ReplicaHealth, candidates
from shardmesh.coordinator.session import Session
from shardmesh.engine.base import MicroBatch, Output, TellToken
from shardmesh.engine.fake import FakeEngine, fake_chain, fake_info
from shardmesh.errors import InputError
from shardmesh.wire.messages import Sampled

CUTS = (0, 2, 4)
PROMPT = tuple(i % 60 for i in range(70))
N_TOKENS = 12
SAMPLED = msgspec.structs.replace(RANDOM, seed=3)
SETTINGS = SessionSettings(n_ctx=200, sampling=SAMPLED, piece_tokens=PIECE_TOKENS)


class LyingEngine(FakeEngine):
    """Changes what it gives in its first `n_lies` micro-batches; always, if that is not said."""

    n_lies: float = float("inf")

    def compute(
        self, batches: Sequence[MicroBatch], tell_token: TellToken | None = None
    ) -> list[Output]:
        outputs = super().compute(batches)
        if self.n_lies <= 0:
            return outputs
        self.n_lies -= 1
        return [_changed(output) for output in outputs]


def _changed(output: Output) -> Output:
    if output.hidden is not None:
        return msgspec.structs.replace(output, hidden=np.roll(output.hidden, 1, axis=1))
    if output.sampled is not None:
        other = dataclasses.replace(output.sampled, token=(output.sampled.token + 1) % 60)
        return msgspec.structs.replace(output, sampled=other)
    return output


def stage(number: int, kind: type[FakeEngine] = FakeEngine) -> FakeEngine:
    start, end = CUTS[number], CUTS[number + 1]
    return kind(fake_info(start, end, CUTS[-1]), layer_start=start)


async def transcript_of(mesh: MemoryMesh) -> Transcript:
    """What the chain of first replicas gives."""
    results: list[Sampled] = []
    async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
        done = await prefill(session, PROMPT)
        for _ in range(N_TOKENS):
            assert done.sampled is not None
            results.append(done.sampled)
            session.send([done.sampled.token], sample=True)
            done = await session.receive()
    return Transcript(mesh.chain, SETTINGS, PROMPT, tuple(results))


@asynccontextmanager
async def opened(mesh: MemoryMesh, chain: Chain) -> AsyncIterator[Session]:
    links = [await mesh.link(COORDINATOR, s.peer_id) for s in chain.stages]
    async with mesh.router.session(chain, links, SETTINGS) as session:
        yield session


async def audited(mesh: MemoryMesh, number: int) -> AuditReport:
    transcript = await transcript_of(mesh)

    async def replay(chain: Chain) -> Results:
        async with opened(mesh, chain) as session:
            return await recompute(session, transcript)

    others = auditable(mesh.chain, mesh.known(), SETTINGS.n_ctx)[number]
    return await audit(transcript, number, others, replay)


@pytest.mark.parametrize("number", [0, 1])
async def test_honest_replicas_agree(number: int) -> None:
    spares = [[stage(0)], [stage(1)]]
    async with memory_mesh(fake_chain(CUTS), spares) as mesh:
        report = await audited(mesh, number)
    assert (report.outcome, report.suspects) == ("same", ())
    assert report.compared == (f"stage-{number}-1",)
    assert report.n_tokens == N_TOKENS


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("liar", [0, 1, 2])
async def test_of_three_the_one_that_differs_is_named(number: int, liar: int) -> None:
    """Replica 0 served the session, the others compute it again."""
    kinds = [FakeEngine] * 3
    kinds[liar] = LyingEngine
    engines, spares = [stage(0), stage(1)], [list[FakeEngine](), list[FakeEngine]()]
    engines[number] = stage(number, kinds[0])
    spares[number] = [stage(number, kind) for kind in kinds[1:]]
    async with memory_mesh(engines, spares) as mesh:
        report = await audited(mesh, number)
    names = (f"stage-{number}", f"stage-{number}-1", f"stage-{number}-2")
    # The third is asked only if the first two differ.
    assert report.outcome == ("same" if liar == 2 else "differs")
    assert report.suspects == (() if liar == 2 else (names[liar],))
    for name in report.suspects:
        assert name in report.sentence


@pytest.mark.parametrize("liar", [0, 1])
async def test_of_two_nobody_can_tell(liar: int) -> None:
    engines, spare = [stage(0), stage(1)], stage(0)
    if liar:
        spare = stage(0, LyingEngine)
    else:
        engines[0] = stage(0, LyingEngine)
    async with memory_mesh(engines, [[spare]]) as mesh:
        report = await audited(mesh, 0)
    assert (report.outcome, report.suspects) == ("disputed", ("stage-0", "stage-0-1"))


async def test_a_stage_that_lied_once_leaves_its_chain_under_suspicion() -> None:
    once = stage(1, LyingEngine)
    assert isinstance(once, LyingEngine)
    once.n_lies = 4
    async with memory_mesh([stage(0), once], [[stage(0)]]) as mesh:
        report = await audited(mesh, 0)
    assert (report.outcome, report.suspects) == ("unrepeatable", ("stage-0", "stage-1"))


async def test_a_liar_elsewhere_in_the_chain_brings_nobody_else_into_disrepute() -> None:
    engines = [stage(0), stage(1, LyingEngine)]
    async with memory_mesh(engines, [[stage(0)]]) as mesh:
        assert (await audited(mesh, 0)).outcome == "same"


async def test_only_those_that_compute_alike_are_compared() -> None:
    async with memory_mesh(fake_chain(CUTS), [[stage(0)], [stage(1)]]) as mesh:
        known = mesh.known()
        other = [dataclasses.replace(r, fingerprint="other") for r in known if "-1" in r.peer_id]
        assert auditable(mesh.chain, known, 200).keys() == {0, 1}
        assert auditable(mesh.chain, other, 200) == {}
        assert auditable(mesh.chain, known, 10_000) == {}
        assert auditable(mesh.chain, mesh.chain.stages, 200) == {}


async def test_nobody_is_kept_waiting_by_an_audit() -> None:
    async with memory_mesh(fake_chain(CUTS), [[stage(0)], [stage(1)]]) as mesh:

        def with_sessions(peer_id: str, n_sessions: int) -> list[Replica]:
            return [
                dataclasses.replace(r, n_parallel=4, n_sessions=n_sessions * (r.peer_id == peer_id))
                for r in mesh.known()
            ]

        assert auditable(mesh.chain, with_sessions("stage-0", 2), 200).keys() == {0, 1}
        assert auditable(mesh.chain, with_sessions("stage-0", 3), 200) == {}
        assert auditable(mesh.chain, with_sessions("stage-0-1", 3), 200).keys() == {1}


# -- the auditor -------------------------------------------------------------------------------


@asynccontextmanager
async def auditor(mesh: MemoryMesh, rate: float) -> AsyncIterator[tuple[Auditor, list[str]]]:
    distrusted: list[str] = []

    def open_session(chain: Chain, settings: SessionSettings):  # type: ignore[no-untyped-def]
        return opened(mesh, chain)

    async with trio.open_nursery() as nursery:
        yield (
            Auditor(rate, nursery, open_session=open_session, distrust=distrusted.append),
            distrusted,
        )


async def test_the_liar_is_set_aside_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    outcomes: list[Outcome] = []
    async with memory_mesh([stage(0, LyingEngine), stage(1)], [[stage(0), stage(0)]]) as mesh:
        transcript = await transcript_of(mesh)
        async with auditor(mesh, 1.0) as (auditing, distrusted):
            auditing.tell(lambda report: outcomes.append(report.outcome))
            auditing.start(transcript, mesh.known())
            auditing.start(transcript, mesh.known())  # one at a time
            await auditing.wait_idle()
    assert (outcomes, distrusted, auditing.n_skipped) == (["differs"], ["stage-0"], 1)
    assert "stage-0 computes layers [0, 2)" in caplog.text


async def test_one_that_is_busy_or_alone_is_left_out() -> None:
    full = FakeEngine(fake_info(0, 2, 4, n_parallel=1))
    async with memory_mesh(fake_chain(CUTS), [[full]]) as mesh:
        transcript = await transcript_of(mesh)
        async with auditor(mesh, 1.0) as (auditing, distrusted):
            auditing.start(transcript, mesh.chain.stages)
            assert auditing.n_skipped == 1
            spare = next(r for r in mesh.known() if r.peer_id == "stage-0-1")
            async with opened(mesh, Chain((spare, mesh.chain.stages[1]))):
                auditing.start(transcript, mesh.known())
                await auditing.wait_idle()
            assert (auditing.n_skipped, distrusted) == (2, [])


async def test_the_share() -> None:
    async with trio.open_nursery() as nursery:
        for rate, expected in ((0.0, 0), (1.0, 200)):
            auditing = Auditor(rate, nursery, open_session=opened, distrust=print)  # type: ignore[arg-type]
            assert sum(auditing.is_due() for _ in range(200)) == expected
        for rate in (-0.1, 1.1):
            with pytest.raises(InputError):
                Auditor(rate, nursery, open_session=opened, distrust=print)  # type: ignore[arg-type]


async def test_who_is_not_trusted_replaces_nobody_for_good() -> None:
    async with memory_mesh(fake_chain(CUTS), [[stage(0)]]) as mesh:
        health, replica = ReplicaHealth(), mesh.known()[1]
        assert candidates([replica], mesh.chain.stages[0], 200) == [replica]
        health.distrust(replica.peer_id)
        assert health.is_aside(replica, 1e9)
        assert not health.is_trusted(replica.peer_id)
