"""A mesh in one thread: stages with fake engines, coordinators, and a network that may fail.

Stages, links, sessions and repairs are those of the product; engines, sockets and the directory are
not.  Every node and every coordinator has a nursery of its own, so that its death is the end of all
that it did, at any point.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np
import trio
from sim.network import Network
from sim.plan import node_name
from support.link_messages import hidden_batch, token_batch
from support.loop_worker import LoopWorker
from support.mesh import DIGEST, link_ends
from support.replicas import replica

from shardmesh.coordinator.chain import Chain, Replica, choose_chain
from shardmesh.coordinator.replacements import ReplicaFinder, ReplicaHealth
from shardmesh.coordinator.router import SessionRouter
from shardmesh.engine.base import MicroBatch, Output, TellToken
from shardmesh.engine.fake import FakeEngine, fake_info
from shardmesh.errors import EngineError, ShardmeshError, UnreachableError
from shardmesh.links.link import Link, LinkUser
from shardmesh.listener.stage import Stage
from shardmesh.listener.stage_session import StageIdentity, Work
from shardmesh.listener.worker import Calculation
from shardmesh.wire.messages import NextStage

BOUNDARIES = (0, 1, 3, 4)
N_CTX = 256
NUMBERS_AT_ONCE = (2, 4)
TOKEN_S = 0.01
PIECE_S = 0.03
SLOW_FACTOR = 10.0
DIAL_TIMEOUT_S = 3.0
GHOST_S = 2.0
"""How long a dead node may still be listed."""


class SimulatedEngine(FakeEngine):
    """A fake that can be told to fail, and counts what it wrote."""

    def __init__(self, stage: int, n_parallel: int) -> None:
        start, end = BOUNDARIES[stage], BOUNDARIES[stage + 1]
        info = fake_info(start, end, BOUNDARIES[-1], n_ctx=N_CTX, n_parallel=n_parallel)
        info = dataclasses.replace(info, numbers_at_once=NUMBERS_AT_ONCE)
        super().__init__(info, layer_start=start)
        self.fails_next = False
        self.spoils_next = False
        self.open_sequences: set[int] = set()
        self.wrong: list[str] = []  # what no stage may ask of an engine

    def open_sequence(self, sequence: int, *settings: Any, **named: Any) -> None:
        super().open_sequence(sequence, *settings, **named)
        self.open_sequences.add(sequence)

    def close_sequence(self, sequence: int, n_keep: int = 0) -> None:
        super().close_sequence(sequence, n_keep)
        self.open_sequences.discard(sequence)

    def compute(
        self, batch: Sequence[MicroBatch], tell_token: TellToken | None = None
    ) -> list[Output]:
        sequences = [micro.sequence for micro in batch]
        are_neighbours = bool(sequences) and all(
            b - a == 1 for a, b in itertools.pairwise(sequences)
        )
        if not are_neighbours or len(batch) not in (1, *NUMBERS_AT_ONCE):
            self.wrong.append(f"the sequences {sequences} are computed at once")
        outputs = super().compute(batch, tell_token)
        if self.fails_next:
            self.fails_next = False
            self._table.damage(batch)
            raise EngineError("the engine failed, as it was told to")
        if self.spoils_next and outputs[0].hidden is not None:
            self.spoils_next = False
            outputs[0].hidden[-1, 0] = np.nan
        return outputs


class Host:
    """A process: what it runs ends with it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nursery: trio.Nursery
        self.is_alive = False
        self.ended = trio.Event()
        self.links: dict[str, Link] = {}  # those that it dialed
        self._dialing: dict[str, trio.Lock] = {}

    async def run(
        self,
        work: Callable[[], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        try:
            async with trio.open_nursery() as self.nursery:
                self.is_alive = True
                task_status.started()
                await work()
                self.nursery.cancel_scope.cancel()
        finally:
            self.is_alive = False
            self.ended.set()

    def kill(self) -> None:
        self.nursery.cancel_scope.cancel()
        self.is_alive = False

    def dialing(self, other: str) -> trio.Lock:
        return self._dialing.setdefault(other, trio.Lock())


class Node(Host):
    """A data process with its stage."""

    def __init__(self, name: str, replica: Replica, engine: SimulatedEngine) -> None:
        super().__init__(name)
        self.replica = replica
        self.engine = engine
        self.stage: Stage
        self.worker: LoopWorker
        self.is_slow = False
        self.working = trio.CancelScope()

    @property
    def user(self) -> LinkUser:
        return self.stage

    def make_worker(self, calculation: Calculation[Work]) -> LoopWorker:
        self.worker = LoopWorker(calculation, self._seconds_of)
        return self.worker

    def _seconds_of(self, n_tokens: int) -> float:
        seconds = TOKEN_S if n_tokens == 1 else PIECE_S
        return seconds * SLOW_FACTOR if self.is_slow else seconds

    async def work(self) -> None:
        with self.working:
            await self.stage.run()
        await trio.sleep_forever()  # one that hangs


class SimulatedCoordinator(Host):
    """A coordinator with its router and what it knows of replicas."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.user = SessionRouter()
        self.health = ReplicaHealth()


class World:
    """All that runs; `nursery` is the world's own, which ends it."""

    def __init__(self, nursery: trio.Nursery, network: Network, n_parallel: int) -> None:
        self.nursery = nursery
        self.network = network
        self.nodes: dict[str, Node] = {}
        self.coordinators: dict[str, SimulatedCoordinator] = {}
        self.log: list[str] = []
        self._n_parallel = n_parallel
        self._listed: dict[str, Replica] = {}
        self.engines: list[SimulatedEngine] = []  # of the dead as well

    def note(self, what: str) -> None:
        self.log.append(f"{trio.current_time():8.4f} {what}")

    # -- nodes ---------------------------------------------------------------------------------

    async def start_node(self, name: str) -> None:
        """A new process of this name, which tells all that it is there."""
        number = int(name.split("-")[1])
        engine = SimulatedEngine(number, self._n_parallel)
        self.engines.append(engine)
        node = Node(name, _replica(name, number, engine), engine)
        self.nodes[name] = node

        async def work() -> None:
            start, end = BOUNDARIES[number], BOUNDARIES[number + 1]
            identity = StageIdentity(DIGEST, start, end)
            get_link = self._dialer(node)
            node.stage = Stage(engine, identity, node.nursery, get_link, node.make_worker)
            self._listed[name] = node.replica
            await node.work()

        await self.nursery.start(node.run, work)

    def kill_node(self, name: str) -> None:
        """SIGKILL; it may be listed for a while after."""
        node = self.nodes[name]
        node.kill()
        self.nursery.start_soon(self._unlist, node.replica)

    async def _unlist(self, replica: Replica) -> None:
        await trio.sleep(GHOST_S)
        if self._listed.get(replica.peer_id) is replica:
            del self._listed[replica.peer_id]

    async def start_coordinator(self, name: str) -> None:
        coordinator = SimulatedCoordinator(name)
        self.coordinators[name] = coordinator
        await self.nursery.start(coordinator.run, trio.sleep_forever)

    def known(self) -> list[Replica]:
        return list(self._listed.values())

    # -- links ---------------------------------------------------------------------------------

    def _dialer(self, node: Node) -> Callable[[NextStage], Awaitable[Link]]:
        async def get_link(target: NextStage) -> Link:
            return await self.link(node, target.peer_id)

        return get_link

    async def link(self, near: Node | SimulatedCoordinator, other: str) -> Link:
        """The open link from a host to a node, as `links.dial.LinkPool` would give it."""
        async with near.dialing(other):
            link = near.links.get(other)
            if link is not None and link.is_open and link.is_suspected:
                if isinstance(near, SimulatedCoordinator):
                    raise UnreachableError(f"{other} is silent", code="LINK_SILENT")
                link = None
            if link is None or not link.is_open:
                link = await self._dial(near, other)
                near.links[other] = link
        return link

    async def _dial(self, near: Node | SimulatedCoordinator, other: str) -> Link:
        await trio.sleep(self.network.delay_s(near.name, other))
        far = self.nodes.get(other)
        if far is None or not far.is_alive:
            raise UnreachableError(f"no link to {other}", code="NO_LINK")
        streams = self.network.connect(near.name, other)
        ends = link_ends(near.user, far.user, names=(near.name, other), streams=streams)
        far.nursery.start_soon(_greet_and_run, ends[1])
        try:
            with trio.fail_after(DIAL_TIMEOUT_S):
                await ends[0].greet()
        except trio.TooSlowError:
            raise UnreachableError(f"{other} does not answer", code="NO_LINK") from None
        near.nursery.start_soon(ends[0].run)
        return ends[0]

    # -- what a coordinator does ------------------------------------------------------------------

    async def chain(
        self, coordinator: SimulatedCoordinator, prefers: Sequence[str]
    ) -> tuple[Chain, list[Link]]:
        """A chain of replicas that did not fail of late, or of all, and the links to it."""
        cost = dict.fromkeys(prefers, -1.0)
        now_s = trio.current_time()
        well = [r for r in self.known() if not coordinator.health.is_aside(r, now_s)]
        try:
            chain = choose_chain(well, costs=_Preference(cost))
        except ShardmeshError:
            chain = choose_chain(self.known(), costs=_Preference(cost))
        links = []
        for stage in chain.stages:
            try:
                links.append(await self.link(coordinator, stage.peer_id))
            except ShardmeshError as error:
                coordinator.health.failed(stage, error, trio.current_time())
                raise UnreachableError(f"no link to {stage.peer_id}") from error
        return chain, links

    def finder(self, coordinator: SimulatedCoordinator, timeout_s: float) -> ReplicaFinder:
        async def connect(replica: Replica) -> Link:
            return await self.link(coordinator, replica.peer_id)

        return ReplicaFinder(
            known=self.known,
            refresh=trio.lowlevel.checkpoint,
            connect=connect,
            health=coordinator.health,
            timeout_s=timeout_s,
        )

    # -- lies ----------------------------------------------------------------------------------

    def send_wrong_frame(self, name: str, how: str) -> None:
        """A stage sends hidden states that cannot be right, of a session that it holds."""
        node = self.nodes[name]
        for session in node.stage.sessions:
            link, n_sent = session.outgoing.hop, session.outgoing.n_done
            if link is None or session.next_stage is None or n_sent == 0:
                continue
            n_embd = node.engine.info.n_embd + (how == "wide frame")
            wrong = hidden_batch(
                session=session.session_id,
                epoch=session.epoch,
                position=n_sent + (5 if how == "early frame" else -1),
                n_embd=n_embd,
                hand=True,
            )
            link.send(wrong, bytes(4 * n_embd))
            return

    def send_stray_token(self, name: str) -> None:
        """A last stage hands on tokens of a session that it holds, which were due or never will."""
        for session in self.nodes[name].stage.sessions:
            if session.first_link is None or not session.first_link.is_open:
                continue
            for position in (max(0, session.n_received - 1), N_CTX - 2, N_CTX):
                stray = token_batch(
                    session=session.session_id,
                    epoch=session.epoch,
                    position=position,
                    branch=session.branch,
                    hand=True,
                )
                session.first_link.send(stray)


async def _greet_and_run(link: Link) -> None:
    try:
        await link.greet()
    except ShardmeshError:
        return  # as an acceptor of connections does
    await link.run()


class _Preference:
    """Costs of nodes; hops are free."""

    def __init__(self, cost: Mapping[str, float]) -> None:
        self._cost = cost

    def stage(self, replica: Replica) -> float:
        return self._cost.get(replica.peer_id, 0.0)

    def hop(self, before: Replica, after: Replica) -> float:
        return 0.0

    def turn(self, last: Replica, first: Replica) -> float:
        return 0.0


def _replica(name: str, number: int, engine: SimulatedEngine) -> Replica:
    return replica(
        name,
        BOUNDARIES[number],
        BOUNDARIES[number + 1],
        model_name="fake",
        manifest_digest=DIGEST,
        shard_id=number,
        n_layer=BOUNDARIES[-1],
        n_ctx=N_CTX,
        fingerprint=engine.info.fingerprint,
    )


__all__ = ["Node", "SimulatedCoordinator", "World", "node_name"]
