"""Finding stages that do not compute what they should: a text is computed again with another one.

After a session its tokens go through the same chain once more, in the same micro-batches, with one
stage in another replica's hands.  All that differs is that stage, so a result that differs is its
work or the other's.  The results are what the last stage samples, with its log-probability, which
is taken from the logits themselves: hidden states that differ show in its last bits.  Stages cannot
tell an audit from any other session, and the one that is audited takes no part.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

from shardmesh.coordinator.chain import Chain, Replica
from shardmesh.coordinator.generate import prefill
from shardmesh.coordinator.openings import SessionSettings
from shardmesh.coordinator.session import N_BATCHES_IN_FLIGHT_MAX, Session
from shardmesh.errors import ProtocolError
from shardmesh.wire.messages import BatchDone, Sampled

Outcome = Literal["same", "differs", "disputed", "unrepeatable"]
Results = tuple[Sampled, ...]


@dataclasses.dataclass(frozen=True)
class Transcript:
    """What a session was asked and what it gave."""

    chain: Chain
    settings: SessionSettings
    prompt: tuple[int, ...]
    results: Results  # never empty


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """What an audit has found; nothing of the text is in it."""

    outcome: Outcome
    model_name: str
    layer_start: int
    layer_end: int
    audited: str  # peer id of the stage that served
    compared: tuple[str, ...]  # peer ids of those that computed the same again
    suspects: tuple[str, ...]  # one that differs from two others, or all that may be wrong
    n_tokens: int

    @property
    def sentence(self) -> str:
        """What a person should know."""
        where = f"layers [{self.layer_start}, {self.layer_end}) of {self.model_name}"
        names = " and ".join(self.suspects)
        return {
            "same": f"{self.audited} computes {where} as {' and '.join(self.compared)} does",
            "differs": f"{names} computes {where} otherwise than two other nodes do",
            "disputed": f"{names} compute {where} differently, and no third node can tell who is "
            "right",
            "unrepeatable": f"a chain gave another result than before; one of its nodes computed "
            f"otherwise then: {names}",
        }[self.outcome]


Replay = Callable[[Chain], Awaitable[Results]]


def auditable(chain: Chain, known: Sequence[Replica], n_ctx: int) -> dict[int, list[Replica]]:
    """Other replicas by number of the stage: of the same layers, and that compute the same bits.

    None if a stage is so busy that an audit would take the place of a person's request.
    """
    found: dict[int, list[Replica]] = {}
    taken = {stage.peer_id for stage in chain.stages}
    if not all(_has_room(replica) for replica in known if replica.peer_id in taken):
        return found
    for number, stage in enumerate(chain.stages):
        others = [
            replica
            for replica in known
            if replica.peer_id not in taken
            and replica.shard_loaded
            and replica.manifest_digest == stage.manifest_digest
            and (replica.layer_start, replica.layer_end) == (stage.layer_start, stage.layer_end)
            and replica.fingerprint == stage.fingerprint
            and replica.n_ctx >= n_ctx
            and _has_room(replica)
        ]
        if others:
            found[number] = others
    return found


def _has_room(replica: Replica) -> bool:
    """Whether there is a sequence left besides the one that an audit takes, as far as is known."""
    return replica.n_sessions == 0 or replica.n_sessions + 1 < replica.n_parallel


def with_stage(chain: Chain, number: int, replica: Replica) -> Chain:
    """The chain with one stage in another replica's hands."""
    return Chain((*chain.stages[:number], replica, *chain.stages[number + 1 :]))


async def audit(
    transcript: Transcript, number: int, others: Sequence[Replica], replay: Replay
) -> AuditReport:
    """Has stage `number` computed again by the first of the others, and settles a difference.

    Raises what `replay` raises.
    """
    chain, given = transcript.chain, transcript.results
    own, other = chain.stages[number].peer_id, others[0].peer_id

    def report(outcome: Outcome, *suspects: str, compared: Sequence[Replica]) -> AuditReport:
        stage = chain.stages[number]
        return AuditReport(
            outcome=outcome,
            model_name=stage.model_name,
            layer_start=stage.layer_start,
            layer_end=stage.layer_end,
            audited=own,
            compared=tuple(replica.peer_id for replica in compared),
            suspects=suspects,
            n_tokens=len(given),
        )

    second = await replay(with_stage(chain, number, others[0]))
    if _agree(second, given):
        return report("same", compared=others[:1])
    if not _agree(await replay(chain), given):
        return report("unrepeatable", *(s.peer_id for s in chain.stages), compared=others[:1])
    if len(others) > 1:
        third = await replay(with_stage(chain, number, others[1]))
        if _agree(third, given):
            return report("differs", other, compared=others[:2])
        if _agree(third, second):
            return report("differs", own, compared=others[:2])
        return report("disputed", own, other, others[1].peer_id, compared=others[:2])
    return report("disputed", own, other, compared=others[:1])


def choose(candidates: dict[int, list[Replica]]) -> tuple[int, list[Replica]]:
    """A stage at random, and its other replicas in random order: nobody can foresee it."""
    generator = random.SystemRandom()
    number = generator.choice(sorted(candidates))
    return number, generator.sample(candidates[number], len(candidates[number]))


async def recompute(session: Session, transcript: Transcript) -> Results:
    """The results that an open session gives for the same micro-batches.

    Raises what the session raises.
    """
    results = [_sampled(await prefill(session, transcript.prompt))]
    tokens = [sampled.token for sampled in transcript.results[:-1]]
    for start in range(0, len(tokens), N_BATCHES_IN_FLIGHT_MAX):
        part = tokens[start : start + N_BATCHES_IN_FLIGHT_MAX]
        for token in part:
            session.send([token], sample=True)
        for _ in part:
            results.append(_sampled(await session.receive()))
    return tuple(results)


def _sampled(done: BatchDone) -> Sampled:
    if done.sampled is None:
        raise ProtocolError("the last stage sampled no token")
    return done.sampled


def _agree(one: Results, other: Results) -> bool:
    return [(s.token, s.logprob) for s in one] == [(s.token, s.logprob) for s in other]
