"""Other replicas of a stage: which of them could take over, and which failed of late."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

import trio

from shardmesh.coordinator.chain import Chain, Costs, Replica, chain_cost
from shardmesh.coordinator.pace import SeenPaces
from shardmesh.errors import ShardmeshError
from shardmesh.links.link import Link
from shardmesh.wire.messages import BatchDone

logger = logging.getLogger(__name__)

ASIDE_MIN_S = 1.0
"""A replica that failed is left alone for so long, twice as long each time that it fails again."""

ASIDE_MAX_S = 60.0
ASIDE_SHORT_S = 0.5
"""One that has no room, or whose shard is being loaded again, is asked again soon."""

SHORTLY_GONE = frozenset({"NO_SESSION", "NOT_LOADED", "NO_LINK", "UNREACHABLE", "LINK_SILENT"})
"""Errors of a replica that may be back at any moment, and that is quickly found out."""

FORGIVEN_AFTER_S = 120.0
"""A failure that is so long past does not make the next one worse."""

LOOK_AGAIN_S = 0.25
"""While nobody can take over, the mesh is looked at this often."""

HEAD_START_S = 1.0
"""After so long without a link the next candidate is tried beside the first; 0.6 s is what a link
takes over a line with 100 ms."""


@dataclasses.dataclass
class _Failures:
    n_lately: int
    n_in_a_row: int  # of those after which it is not expected back at once
    failed_s: float
    until_s: float


class ReplicaHealth:
    """Which replicas failed a session of late.  Pure: times come from the caller."""

    def __init__(self) -> None:
        self._failures: dict[str, _Failures] = {}
        self._full_until_s: dict[str, float] = {}
        self._distrusted: set[str] = set()

    def distrust(self, peer_id: str) -> None:
        """Leaves a node alone for good, since it computes what it should not."""
        self._distrusted.add(peer_id)

    def is_trusted(self, peer_id: str) -> bool:
        """Whether nobody said otherwise; one that failed lately is trusted all the same."""
        return peer_id not in self._distrusted

    def failed(self, replica: Replica, error: ShardmeshError, now_s: float) -> None:
        """Notes a failure; several sessions may report the same one.

        One that has no room did not fail: it is only not asked again at once.
        """
        if error.code == "BUSY":
            self._full_until_s[replica.peer_id] = now_s + ASIDE_SHORT_S
            self._forget_old(now_s)
            return
        known = self._failures.get(replica.peer_id)
        if known is not None and known.n_in_a_row and now_s < known.until_s:
            return  # all its sessions tell of the same failure, one after the other
        if known is None or now_s - known.failed_s > FORGIVEN_AFTER_S:
            known = _Failures(0, 0, now_s, now_s)
        n_in_a_row = known.n_in_a_row + 1
        aside_s = min(ASIDE_MIN_S * 2.0 ** min(n_in_a_row - 1, 16), ASIDE_MAX_S)
        if error.code in SHORTLY_GONE:
            n_in_a_row, aside_s = 0, ASIDE_SHORT_S
        self._failures[replica.peer_id] = _Failures(
            known.n_lately + (error.code != "LINK_SILENT"), n_in_a_row, now_s, now_s + aside_s
        )
        self._forget_old(now_s)

    def is_aside(self, replica: Replica, now_s: float) -> bool:
        """Whether to leave it alone: it failed lately, has no room, or is not trusted."""
        if replica.peer_id in self._distrusted or self.is_full(replica, now_s):
            return True
        known = self._failures.get(replica.peer_id)
        return known is not None and now_s < known.until_s

    def is_full(self, replica: Replica, now_s: float) -> bool:
        """Whether it has just said that it has no room, and no session of ours left it since."""
        return now_s < self._full_until_s.get(replica.peer_id, 0.0)

    def went_well(self, replica: Replica) -> None:
        """A result has come through it: what it failed before does not make the next time worse."""
        self._failures.pop(replica.peer_id, None)

    def has_room(self, replica: Replica) -> None:
        """A session has left it, so there is room for another."""
        self._full_until_s.pop(replica.peer_id, None)

    def n_failures(self, peer_id: str) -> int:
        """How often it failed, one time not long after the other; silence is noticed for free."""
        known = self._failures.get(peer_id)
        return known.n_lately if known is not None else 0

    def _forget_old(self, now_s: float) -> None:
        for peer_id, failures in list(self._failures.items()):
            if now_s - failures.failed_s > FORGIVEN_AFTER_S:
                del self._failures[peer_id]
        for peer_id, until_s in list(self._full_until_s.items()):
            if until_s <= now_s:
                del self._full_until_s[peer_id]


def candidates(known: Iterable[Replica], stage: Replica, n_ctx: int) -> list[Replica]:
    """Loaded replicas of the same layers of the same split with enough room."""
    return [
        replica
        for replica in known
        if replica.shard_loaded
        and replica.manifest_digest == stage.manifest_digest
        and (replica.layer_start, replica.layer_end) == (stage.layer_start, stage.layer_end)
        and replica.n_ctx >= n_ctx
    ]


class ReplicaFinder:
    """The `Replacements` of one session; health is shared by all sessions of a coordinator."""

    def __init__(
        self,
        *,
        known: Callable[[], Sequence[Replica]],
        refresh: Callable[[], Awaitable[None]],
        connect: Callable[[Replica], Awaitable[Link]],
        health: ReplicaHealth,
        timeout_s: float,
        linked: Callable[[Replica], Link | None] = lambda replica: None,
        costs: Callable[[Sequence[Replica]], Costs] | None = None,
        seen: SeenPaces | None = None,
    ) -> None:
        """`refresh` asks the mesh for news that `known` gives afterwards.

        `linked` gives the link to a replica if there is one that is well, `connect` makes one.
        Of several replicas the cheapest by `costs` is taken; `seen` learns from results.
        """
        self._costs = costs
        self._seen = seen
        self._known = known
        self._refresh = refresh
        self._connect = connect
        self._linked = linked
        self._health = health
        self._timeout_s = timeout_s

    @property
    def timeout_s(self) -> float:
        return self._timeout_s

    def has_other(self, stage: Replica, n_ctx: int) -> bool:
        return any(r.peer_id != stage.peer_id for r in self._free(stage, n_ctx))

    def set_aside(self, stage: Replica, error: ShardmeshError) -> None:
        self._health.failed(stage, error, trio.current_time())

    def note_room(self, stages: Iterable[Replica]) -> None:
        for stage in stages:
            self._health.has_room(stage)

    async def replace(
        self, chain: Chain, number: int, n_ctx: int, prefer: str | None = None
    ) -> tuple[Replica, Link]:
        best = self._best(chain, number, n_ctx, prefer)
        link = self._linked(best[0]) if best else None
        if link is not None:  # in a crowd each turn of the loop takes milliseconds
            return best[0], link
        race = _Race(self._connect_or_set_aside)
        async with trio.open_nursery() as nursery:
            while race.winner is None:
                best = self._best(chain, number, n_ctx, prefer)
                free = [replica for replica in best if replica.peer_id not in race.under_way]
                if free:
                    race.start(free[0], nursery)
                    await race.wait(HEAD_START_S)
                else:
                    look_again_s = trio.current_time() + LOOK_AGAIN_S
                    with trio.move_on_at(look_again_s):
                        await self._refresh()
                    await race.wait(look_again_s - trio.current_time())
            nursery.cancel_scope.cancel()
        return race.winner

    async def standby(
        self, chain: Chain, number: int, n_ctx: int, without: Collection[str]
    ) -> tuple[Replica, Link] | None:
        stage = chain.stages[number]
        alike = [
            replica
            for replica in self._free(stage, n_ctx)
            if replica.fingerprint == stage.fingerprint
            and replica.peer_id != stage.peer_id
            and replica.peer_id not in without
        ]
        return await self._first_reachable(self._ordered(alike, chain, number))

    def note_result(self, chain: Chain, done: BatchDone) -> None:
        for stage in chain.stages:
            self._health.went_well(stage)
        if self._seen is not None and done.n_tokens == 1:
            self._seen.note(chain.stages, done.timings, trio.current_time())

    def _best(self, chain: Chain, number: int, n_ctx: int, prefer: str | None) -> list[Replica]:
        """Who can take a stage's place: `prefer` first, the others by what they cost."""
        best = self._ordered(self._free(chain.stages[number], n_ctx), chain, number)
        return sorted(best, key=lambda replica: replica.peer_id != prefer)

    def _ordered(self, found: Sequence[Replica], chain: Chain, number: int) -> list[Replica]:
        """The best first: those that compute alike give the same bits; of them the fastest."""
        stages = chain.stages
        costs = self._costs([*found, *stages]) if self._costs is not None else None

        def order(replica: Replica) -> tuple[bool, float, str]:
            is_other = replica.fingerprint != stages[number].fingerprint
            changed = (*stages[:number], replica, *stages[number + 1 :])
            cost = 0.0 if costs is None else chain_cost(changed, costs)
            return is_other, cost, replica.peer_id

        return sorted(found, key=order)

    def _free(self, stage: Replica, n_ctx: int) -> list[Replica]:
        now_s = trio.current_time()
        return [
            replica
            for replica in candidates(self._known(), stage, n_ctx)
            if not self._health.is_aside(replica, now_s)
        ]

    async def _first_reachable(self, ordered: Sequence[Replica]) -> tuple[Replica, Link] | None:
        for replica in ordered:
            link = await self._connect_or_set_aside(replica)
            if link is not None:
                return replica, link
        return None

    async def _connect_or_set_aside(self, replica: Replica) -> Link | None:
        try:
            return await self._connect(replica)
        except ShardmeshError as error:
            logger.info("%s cannot take over: [%s] %s", replica.peer_id, error.code, error)
            self.set_aside(replica, error)
            return None


class _Race:
    """Attempts to link to several replicas; the first that succeeds wins."""

    def __init__(self, connect: Callable[[Replica], Awaitable[Link | None]]) -> None:
        self.winner: tuple[Replica, Link] | None = None
        self.under_way: set[str] = set()
        self._connect = connect
        self._news = trio.Event()

    def start(self, replica: Replica, nursery: trio.Nursery) -> None:
        self.under_way.add(replica.peer_id)
        nursery.start_soon(self._attempt, replica)

    async def wait(self, timeout_s: float) -> None:
        """Until an attempt is over, at most so long; not at all if somebody has won."""
        if self.winner is None:
            with trio.move_on_after(max(0.0, timeout_s)):
                await self._news.wait()

    async def _attempt(self, replica: Replica) -> None:
        link = await self._connect(replica)
        self.under_way.discard(replica.peer_id)
        if link is not None and self.winner is None:
            self.winner = replica, link
        self._news.set()
        self._news = trio.Event()
