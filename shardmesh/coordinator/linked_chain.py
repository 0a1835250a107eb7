"""From what the mesh offers to a chain whose links are up, and to replacements for its stages."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import trio

from shardmesh.coordinator.chain import Chain, Replica, choose_chain, pinned
from shardmesh.coordinator.pace import Explanation, SeenPaces, TokenCosts, explain, token_costs
from shardmesh.coordinator.replacements import ReplicaFinder, ReplicaHealth
from shardmesh.errors import BusyError, ShardmeshError, UnreachableError
from shardmesh.links.dial import LinkPool
from shardmesh.links.link import Link

SPARES_PER_STAGE, SPARES_MAX = 2, 16
"""Replicas that a link is brought up to although the chain goes through others: a stage that fails
is replaced sooner then, and in a crowd the next chain is there.  More are seldom needed at once."""

LINK_TIMEOUT_S = 12.0
"""For agreeing on a link with a stage and dialing it."""

REPLACEMENT_LINK_TIMEOUT_S = 3.0
"""The same for one that is to replace another, since a new attempt gets on where an old one hangs;
twice as long after each failure of the node, up to LINK_TIMEOUT_S: the line may be slow."""


@dataclasses.dataclass(frozen=True)
class Wish:
    """Which chain is wanted; nodes are named by a peer id or its end."""

    model_name: str | None = None
    via: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LinkedChain:
    """A chain, the links to its stages in order, why it was chosen, and out of what.

    `replicas` are all that may serve the request, also where it names others to begin with.
    """

    chain: Chain
    links: list[Link]
    explanation: Explanation
    replicas: Sequence[Replica]


class _UnlinkedError(Exception):
    """A stage that no link could be had to."""

    def __init__(self, stage: Replica, cause: ShardmeshError) -> None:
        super().__init__(stage.peer_id, cause)
        self.stage = stage
        self.cause = cause


class ChainLinker:
    """Chooses chains and brings up their links; remembers who was slow and who failed."""

    def __init__(self, pool: LinkPool, own_sessions: Callable[[], Counter[str]]) -> None:
        """`own_sessions` counts this coordinator's sessions on each node, by peer id."""
        self._pool = pool
        self._own_sessions = own_sessions
        self._prepared = Counter[str]()
        self._health = ReplicaHealth()
        self._seen = SeenPaces()

    async def link(self, replicas: Sequence[Replica], wish: Wish) -> LinkedChain:
        """The best chain; whoever cannot be reached is passed over.

        Raises what `choose_chain` and `pinned` raise, and the first error of a link if there is no
        other chain.
        """
        trusted = [r for r in replicas if self._health.is_trusted(r.peer_id)]
        allowed = pinned(trusted, via=wish.via, avoid=wish.avoid)
        first_error: _UnlinkedError | None = None
        while True:
            costs = self._costs(allowed)
            try:
                chain = self._choose(allowed, wish, costs, only_well=first_error is not None)
            except ShardmeshError as error:
                raise (first_error.cause if first_error else error) from None
            try:
                links = await self._links(chain.stages)
            except _UnlinkedError as error:
                first_error = first_error or error
                self._health.failed(error.stage, error.cause, trio.current_time())
            else:
                explanation = explain(chain.stages, allowed, costs)
                return LinkedChain(chain, links, explanation, pinned(trusted, avoid=wish.avoid))

    @contextmanager
    def reserve(self, chain: Chain) -> Iterator[None]:
        """Counts a session that is being prepared as one that is on its chain already.

        Else, in a crowd, all who prepare one meanwhile go for the same place.
        """
        peer_ids = [stage.peer_id for stage in chain.stages]
        self._prepared.update(peer_ids)
        try:
            yield
        finally:
            self._prepared -= Counter(peer_ids)

    def link_spares(self, linked: LinkedChain) -> None:
        """Has some of those dialed that could replace a stage of the chain; not waited for.

        Those that have a link already count first, the others come as they fall, so that
        coordinators differ.
        """
        now_s = trio.current_time()
        well = [r for r in linked.replicas if not self._health.is_aside(r, now_s)]
        well.sort(key=lambda r: (self._pool.open_link(r.peer_id) is None, random.random()))
        for spare in spares(linked.chain, well):
            self._pool.dial_soon(spare.peer_id, spare.addresses, LINK_TIMEOUT_S)

    def distrust(self, peer_id: str) -> None:
        """Uses a node in no chain any more, and as nobody's replacement."""
        self._health.distrust(peer_id)

    def is_trusted(self, peer_id: str) -> bool:
        """Whether a node may be used at all."""
        return self._health.is_trusted(peer_id)

    async def links_of(self, chain: Chain) -> list[Link]:
        """The links to the stages of a chain that was chosen elsewhere; raises a link's error."""
        try:
            return await self._links(chain.stages)
        except _UnlinkedError as error:
            raise error.cause from None

    def finder(
        self,
        known: Callable[[], Sequence[Replica]],
        refresh: Callable[[], Awaitable[None]],
        timeout_s: float,
        unwanted: frozenset[str] = frozenset(),
    ) -> ReplicaFinder:
        """Replacements for one session; never those whose peer ids are `unwanted`."""

        async def connect(replica: Replica) -> Link:
            n_failures = min(self._health.n_failures(replica.peer_id), 16)
            timeout_s = min(REPLACEMENT_LINK_TIMEOUT_S * 2.0**n_failures, LINK_TIMEOUT_S)
            try:
                return await self._link_to(replica, timeout_s)
            except _UnlinkedError as error:
                raise error.cause from None

        return ReplicaFinder(
            known=lambda: [r for r in known() if r.peer_id not in unwanted],
            refresh=refresh,
            connect=connect,
            linked=self._well_linked,
            health=self._health,
            timeout_s=timeout_s,
            costs=self._costs,
            seen=self._seen,
        )

    def _costs(self, replicas: Sequence[Replica]) -> TokenCosts:
        now_s = trio.current_time()
        return token_costs(
            replicas,
            seen_us=lambda peer_id: self._seen.stage_us(peer_id, now_s),
            own_hops_us={p: us / 2 for p, us in self._pool.round_trips_us().items()},
            own_sessions=self._places_taken(),
            jitter=random.random,
        )

    def _places_taken(self) -> Counter[str]:
        """How many places on each node are this coordinator's, by peer id."""
        return self._own_sessions() + self._prepared

    def _choose(
        self, replicas: Sequence[Replica], wish: Wish, costs: TokenCosts, *, only_well: bool
    ) -> Chain:
        """A chain of replicas that did not fail of late; of all, if need be and allowed.

        Raises BusyError (the moment's) if it would need one that has just said that it is full, or
        whose places are all this coordinator's: in a crowd, asking each time would take longer than
        what the others compute.
        """
        now_s = trio.current_time()
        with_room = self._with_room(replicas, now_s)
        well = [replica for replica in with_room if not self._health.is_aside(replica, now_s)]
        try:
            return choose_chain(well, model_name=wish.model_name, costs=costs)
        except ShardmeshError:
            if only_well:
                raise
        try:
            return choose_chain(with_room, model_name=wish.model_name, costs=costs)
        except ShardmeshError:
            choose_chain(replicas, model_name=wish.model_name, costs=costs)  # raises its own error
        raise BusyError(
            "all sequences of some layers were in use a moment ago",
            next_step="try again shortly, or start listeners with a larger --parallel",
        )

    def _with_room(self, replicas: Sequence[Replica], now_s: float) -> list[Replica]:
        """Those that may have a place for another session, as far as can be known unasked."""
        taken = self._places_taken()
        return [
            replica
            for replica in replicas
            if not self._health.is_full(replica, now_s)
            and not 0 < replica.n_parallel <= taken[replica.peer_id]
        ]

    def _well_linked(self, replica: Replica) -> Link | None:
        link = self._pool.open_link(replica.peer_id)
        return None if link is None or link.is_suspected else link

    async def _links(self, stages: Sequence[Replica]) -> list[Link]:
        """The links to all stages, brought up at once; raises the first _UnlinkedError."""
        known = [link for stage in stages if (link := self._well_linked(stage)) is not None]
        if len(known) == len(stages):  # as for all requests but the first: nobody has to be asked
            return known
        links: dict[int, Link] = {}

        async def bring_up(number: int, stage: Replica) -> None:
            links[number] = await self._link_to(stage, LINK_TIMEOUT_S)

        try:
            async with trio.open_nursery() as nursery:
                for number, stage in enumerate(stages):
                    nursery.start_soon(bring_up, number, stage)
        except ExceptionGroup as group:
            unlinked, others = group.split(_UnlinkedError)
            if others is not None or unlinked is None:
                raise
            raise _first(unlinked) from None
        return [links[number] for number in range(len(stages))]

    async def _link_to(self, stage: Replica, timeout_s: float) -> Link:
        link = self._pool.open_link(stage.peer_id)
        if link is not None and link.is_suspected:
            # Another may be well, so nobody waits; but once it can be dialed it may be taken again.
            self._pool.dial_soon(stage.peer_id, stage.addresses, timeout_s)
            silent = UnreachableError(f"{stage.peer_id} is silent", code="LINK_SILENT")
            raise _UnlinkedError(stage, silent)
        try:
            return await self._pool.get(stage.peer_id, stage.addresses, timeout_s)
        except ShardmeshError as error:
            raise _UnlinkedError(stage, error) from error


def spares(chain: Chain, replicas: Iterable[Replica]) -> list[Replica]:
    """Whom to have links to beside the chain: the first few of each stage, some in all.  Pure."""
    in_use = {stage.peer_id for stage in chain.stages}
    n_left = {(stage.layer_start, stage.layer_end): SPARES_PER_STAGE for stage in chain.stages}
    digest, found = chain.stages[0].manifest_digest, list[Replica]()
    for replica in replicas:
        layers = replica.layer_start, replica.layer_end
        is_alike = replica.shard_loaded and replica.manifest_digest == digest
        if is_alike and n_left.get(layers, 0) and replica.peer_id not in in_use:
            n_left[layers] -= 1
            found.append(replica)
    return found[:SPARES_MAX]


def _first(group: BaseExceptionGroup[_UnlinkedError]) -> _UnlinkedError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
