"""The expected time of a token over a chain, out of what nodes publish and what was seen.  Pure.

    time of a token = sum over stages (waiting + computing + hop behind it)

Behind the last stage that is the hop to the first one, where the next token begins.  A stage
computes the tokens of its sessions in turn, so one more session waits for the others.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from shardmesh.coordinator.chain import Replica, chain_cost
from shardmesh.wire.messages import StageTiming

LAYER_US_DEFAULT = 500.0
"""Computing one token in one layer, where nobody of the model has said anything yet."""

HOP_US_DEFAULT = 500.0
"""One way between two nodes that have not measured it and no others have either."""

FULL_US = 10e6
"""A stage without a free sequence would say BUSY: only taken where there is no other."""

OTHER_ENGINE_US = 1e6
"""Neighbours that compute differently do not give one process's bits: better a slower chain."""

COORDINATOR_WEIGHT = 1 / 64
"""Of the hops to and from the coordinator, which the first of some dozens of tokens takes.  Each
token is also sent that way, but nobody waits for it."""

SEEN_WEIGHT = 0.2
"""Of a new step in what is remembered: some ten tokens make a change known."""

SEEN_FOR_S = 15.0
"""What was seen for so long ago is worth less than what the node publishes."""


@dataclasses.dataclass
class _Seen:
    stage_us: float
    seen_s: float


class SeenPaces:
    """What the results of running sessions tell about their stages; times come from the caller."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def note(self, stages: Sequence[Replica], timings: Sequence[StageTiming], now_s: float) -> None:
        """One decode step: what each stage of the chain reports of itself."""
        for replica, timing in zip(stages, timings, strict=False):
            known = self._seen.get(replica.peer_id)
            stage_us = float(timing.compute_us)
            if known is not None and now_s - known.seen_s < SEEN_FOR_S:
                stage_us = known.stage_us + SEEN_WEIGHT * (stage_us - known.stage_us)
            self._seen[replica.peer_id] = _Seen(stage_us, now_s)
        for peer_id in [p for p, s in self._seen.items() if now_s - s.seen_s > SEEN_FOR_S]:
            del self._seen[peer_id]

    def stage_us(self, peer_id: str, now_s: float) -> float | None:
        """Computing one token, None if it was not seen of late."""
        known = self._seen.get(peer_id)
        return known.stage_us if known is not None and now_s - known.seen_s < SEEN_FOR_S else None


@dataclasses.dataclass(frozen=True)
class TokenCosts:
    """Microseconds of one token in a stage and on a hop; the `Costs` of `choose_chain`."""

    compute_us: Mapping[str, float]  # by peer id
    n_sessions: Mapping[str, int]
    hops_us: Mapping[tuple[str, str], float]  # one way, by peer ids; "" is the coordinator
    hop_us_default: float

    def stage(self, replica: Replica) -> float:
        """Waiting and computing."""
        n_sessions = self.n_sessions.get(replica.peer_id, 0)
        cost_us = self.compute_us[replica.peer_id] * (1 + n_sessions)
        if replica.n_parallel and n_sessions >= replica.n_parallel:
            cost_us += FULL_US
        return cost_us

    def hop(self, before: Replica, after: Replica) -> float:
        """From one stage to the next."""
        is_other = before.fingerprint != after.fingerprint
        return self._way_us(before.peer_id, after.peer_id) + is_other * OTHER_ENGINE_US

    def turn(self, last: Replica, first: Replica) -> float:
        """From the last stage to the first; over the coordinator, where that is the same node."""
        over_coordinator_us = self._way_us("", first.peer_id) + self._way_us(last.peer_id, "")
        if last.peer_id == first.peer_id:
            return over_coordinator_us
        straight_us = self._way_us(last.peer_id, first.peer_id)
        return straight_us + COORDINATOR_WEIGHT * over_coordinator_us

    def _way_us(self, here: str, there: str) -> float:
        known_us = self.hops_us.get((here, there), self.hops_us.get((there, here)))
        return self.hop_us_default if known_us is None else known_us


def token_costs(
    replicas: Iterable[Replica],
    *,
    seen_us: Callable[[str], float | None],
    own_hops_us: Mapping[str, float],
    own_sessions: Mapping[str, int],
    jitter: Callable[[], float] = lambda: 0.0,
) -> TokenCosts:
    """Costs from what nodes publish, corrected by what this coordinator sees itself.

    `own_hops_us` are its links, `own_sessions` counts its sessions, which nodes may not have told
    of yet.  `jitter` gives 0 to 1 and makes equal replicas differ a little, so that coordinators
    that start at once do not all take the same.
    """
    found = list(replicas)
    per_layer = [
        r.token_us / (r.layer_end - r.layer_start)
        for r in found
        if r.token_us and r.layer_end > r.layer_start
    ]
    layer_us = statistics.median(per_layer) if per_layer else LAYER_US_DEFAULT
    compute_us: dict[str, float] = {}
    hops_us: dict[tuple[str, str], float] = {("", p): us for p, us in own_hops_us.items()}
    for replica in found:
        known_us = seen_us(replica.peer_id) or replica.token_us
        known_us = known_us or layer_us * (replica.layer_end - replica.layer_start)
        compute_us[replica.peer_id] = known_us * (1 + 0.05 * jitter())
        for other, round_trip_us in replica.round_trips_us:
            hops_us[replica.peer_id, other] = round_trip_us / 2
    published = [us for (here, _), us in hops_us.items() if here]
    return TokenCosts(
        compute_us=compute_us,
        n_sessions={r.peer_id: max(r.n_sessions, own_sessions.get(r.peer_id, 0)) for r in found},
        hops_us=hops_us,
        hop_us_default=statistics.median(published) if published else HOP_US_DEFAULT,
    )


@dataclasses.dataclass(frozen=True)
class Considered:
    """One replica as the choice saw it."""

    replica: Replica
    is_chosen: bool
    compute_us: float
    n_sessions: int
    stage_us: float  # waiting and computing
    hop_us: float  # to it, from the chosen stage before it; to the first from the last


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why this chain."""

    token_us: float  # expected, of the chosen chain
    considered: tuple[Considered, ...]  # by layers, the chosen one first


def explain(
    stages: Sequence[Replica], replicas: Iterable[Replica], costs: TokenCosts
) -> Explanation:
    """The choice with its numbers: each stage's replicas, and the time of a token."""
    considered = []
    for number, chosen in enumerate(stages):
        others = [
            r
            for r in replicas
            if (r.layer_start, r.layer_end) == (chosen.layer_start, chosen.layer_end)
            and r.manifest_digest == chosen.manifest_digest
            and r.shard_loaded
            and r.peer_id != chosen.peer_id
        ]
        for replica in (chosen, *sorted(others, key=costs.stage)):
            considered.append(
                Considered(
                    replica=replica,
                    is_chosen=replica is chosen,
                    compute_us=costs.compute_us[replica.peer_id],
                    n_sessions=costs.n_sessions[replica.peer_id],
                    stage_us=costs.stage(replica),
                    hop_us=_hop_to(replica, number, stages, costs),
                )
            )
    return Explanation(chain_cost(stages, costs), tuple(considered))


def _hop_to(replica: Replica, number: int, stages: Sequence[Replica], costs: TokenCosts) -> float:
    """To what is or could be stage `number`; a single stage has itself before it."""
    if number:
        return costs.hop(stages[number - 1], replica)
    return costs.turn(stages[-1] if len(stages) > 1 else replica, replica)
