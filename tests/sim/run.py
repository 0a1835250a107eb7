"""Plays a plan in a world and looks at what is left: the one entry point of the simulation."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Sequence
from functools import lru_cache

import msgspec
import trio
from sim.network import Network
from sim.plan import (
    N_COORDINATORS,
    Fault,
    Plan,
    SessionPlan,
    coordinator_name,
    make_plan,
    node_name,
)
from sim.schedule import run_seeded
from sim.world import N_CTX, SimulatedCoordinator, World
from support.mesh import GREEDY, PIECE_TOKENS
from support.replicated import one_engine_tokens

from shardmesh.coordinator.generate import prefill
from shardmesh.coordinator.openings import SessionSettings
from shardmesh.coordinator.prefixes import PromptPrefix
from shardmesh.coordinator.repairs import Repair
from shardmesh.coordinator.session import Session
from shardmesh.errors import OurError, ShardmeshError
from shardmesh.wire.limits import HEARTBEAT_TIMEOUT_S
from shardmesh.wire.messages import Sampling

REPLICA_WAIT_S = 20.0
SESSION_WITHIN_S = 90.0
"""From asking to the last token, pauses between attempts and all; faults end long before."""

N_VOCAB = 64
ASK_AGAIN_S = 0.2
SETTLE_S = 0.5
ASKER_KEY = bytes(32)
"""Both coordinators are of one user."""


class SimulationError(AssertionError):
    """What must always hold did not."""


@dataclasses.dataclass
class Outcome:
    """What a run came to."""

    seed: int
    n_sessions: int = 0
    n_finished: int = 0
    n_cancelled: int = 0  # by their users, or with their coordinator
    n_repairs: int = 0
    n_refused: int = 0  # attempts that found no room or no chain
    n_reused: int = 0  # tokens of prompts
    n_guesses: int = 0  # tokens sent ahead
    n_copied: int = 0  # positions that standbys did not have to compute
    n_handed: int = 0  # tokens that the last stage sent to the first
    n_late_frames: int = 0
    longest_pause_s: float = 0.0
    ended_s: float = 0.0
    digest: str = ""  # of everything that was noted, to compare two runs


@lru_cache(maxsize=256)
def undisturbed(
    prompt: tuple[int, ...], n_tokens: int, temperature: float, piece_tokens: int = PIECE_TOKENS
) -> list[int]:
    """The tokens of one engine with all layers, fed the same micro-batches."""
    return one_engine_tokens(
        prompt,
        n_tokens,
        temperature=temperature,
        seed=n_tokens,
        n_ctx=N_CTX,
        piece_tokens=piece_tokens,
    )


def simulate(seed: int) -> Outcome:
    """Runs the plan of a seed; raises SimulationError, with the plan, if something did not hold."""
    plan = make_plan(seed)
    play = Play(plan)
    try:
        run_seeded(seed, play.run)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise SimulationError(
            f"{_innermost(error)!r} with seed {seed}; repeat it with\n"
            f"    make sim FIRST={seed} SEEDS=1\n{plan}\n" + "\n".join(play.log)
        ) from error
    return play.outcome


class Play:
    """One run of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.outcome = Outcome(plan.seed, n_sessions=len(plan.sessions))
        self._chance = random.Random(plan.seed + 2)
        self.log: list[str] = []
        self._world: World

    async def run(self) -> None:
        network = Network(random.Random(self.plan.seed + 1))
        async with trio.open_nursery() as nursery:
            self._world = World(nursery, network, self.plan.n_parallel)
            self._world.log = self.log
            late = {name for _, name in self.plan.late_replicas}
            for n in range(N_COORDINATORS):
                await self._world.start_coordinator(coordinator_name(n))
            for name in self.plan.nodes():
                if name not in late:
                    await self._world.start_node(name)
            await self._play()
            await self._check_nothing_left()
            self._count()
            nursery.cancel_scope.cancel()

    async def _play(self) -> None:
        """Until all sessions are over; faults that are to come then are left out."""
        async with trio.open_nursery() as faults:
            for at_s, name in self.plan.late_replicas:
                faults.start_soon(self._join, at_s, name)
            for fault in self.plan.faults:
                faults.start_soon(self._strike, fault)
            async with trio.open_nursery() as sessions:
                for session in self.plan.sessions:
                    sessions.start_soon(self._session, session)
            faults.cancel_scope.cancel()

    # -- sessions ------------------------------------------------------------------------------

    async def _session(self, plan: SessionPlan) -> None:
        await trio.sleep(plan.at_s)
        coordinator = self._world.coordinators[plan.coordinator]
        if not coordinator.is_alive:
            self.outcome.n_cancelled += 1
            return
        # In the coordinator's nursery: it dies with it.
        done = trio.Event()
        coordinator.nursery.start_soon(self._generate, plan, coordinator, done)
        async with trio.open_nursery() as waiting:
            waiting.start_soon(_then_cancel, done, waiting.cancel_scope)
            waiting.start_soon(_then_cancel, coordinator.ended, waiting.cancel_scope)
        if not done.is_set():
            self.outcome.n_cancelled += 1

    async def _generate(
        self, plan: SessionPlan, coordinator: SimulatedCoordinator, done: trio.Event
    ) -> None:
        patience_s = plan.cancelled_after_s
        with trio.move_on_after(float("inf") if patience_s is None else patience_s) as scope:
            with trio.fail_after(SESSION_WITHIN_S):
                tokens = await self._ask_until_served(plan, coordinator)
        if scope.cancelled_caught:
            self.outcome.n_cancelled += 1
        else:
            wanted = self._undisturbed(plan)
            self._world.note(f"session {plan.number} is finished: {tokens == wanted}")
            if tokens != wanted:
                raise SimulationError(f"session {plan.number}: {tokens} instead of {wanted}")
            self.outcome.n_finished += 1
        done.set()

    def _undisturbed(self, plan: SessionPlan) -> list[int]:
        return undisturbed(plan.prompt, plan.n_tokens, plan.temperature, self.plan.piece_tokens)

    async def _ask_until_served(
        self, plan: SessionPlan, coordinator: SimulatedCoordinator
    ) -> list[int]:
        """Asks again as long as nothing was begun, as a user would who is told to."""
        world = self._world
        while True:
            tokens: list[int] = []
            try:
                chain, links = await world.chain(coordinator, _preferred(plan))
                finder = world.finder(coordinator, REPLICA_WAIT_S)
                settings = SessionSettings(
                    n_ctx=N_CTX,
                    sampling=_sampling(plan),
                    piece_tokens=self.plan.piece_tokens,
                    prefix=PromptPrefix(plan.prompt, ASKER_KEY),
                    standby=plan.standby,
                    hands_on=plan.hands_on > 0,
                )
                async with coordinator.user.session(chain, links, settings, finder) as session:
                    if session.standbys is not None:
                        coordinator.nursery.start_soon(session.standbys.run)
                    world.note(f"session {plan.number} on {[s.peer_id for s in chain.stages]}")
                    self.outcome.n_reused += session.n_reused
                    done = await prefill(session, plan.prompt, hand=self._hands(plan))
                    while True:
                        assert done.sampled is not None
                        tokens.append(done.sampled.token)
                        if len(tokens) == plan.n_tokens:
                            self.outcome.n_handed += session.n_handed
                            self._note_repairs(plan, session.repairs)
                            return tokens
                        if plan.reads_after_s:
                            await trio.sleep(plan.reads_after_s)
                        session.send([tokens[-1]], sample=True, hand=self._hands(plan))
                        self._guess(plan, session, len(tokens))
                        done = await session.receive()
            except ShardmeshError as error:
                world.note(f"session {plan.number} at {len(tokens)}: [{error.code}] {error}")
                if error.blame != "moment" or tokens:
                    raise
                self.outcome.n_refused += 1
            await trio.sleep(ASK_AGAIN_S)

    def _hands(self, plan: SessionPlan) -> bool:
        return self._chance.random() < plan.hands_on

    def _guess(self, plan: SessionPlan, session: Session, n_tokens: int) -> None:
        """Sends what comes next, or something else, ahead of the results."""
        wanted = self._undisturbed(plan)
        for n_known in range(n_tokens + len(session.guesses), plan.n_tokens - 1):
            if len(session.guesses) >= plan.n_guesses:
                break
            is_right = self._chance.random() < plan.guesses_right
            session.guess(wanted[n_known] if is_right else (wanted[n_known] + 1) % N_VOCAB)
            self.outcome.n_guesses += 1

    def _note_repairs(self, plan: SessionPlan, repairs: Sequence[Repair]) -> None:
        for repair in repairs:
            self._require(
                repair.code != OurError.default_code, f"a stage found a fault of ours: {repair}"
            )
            self.outcome.n_repairs += 1
            self.outcome.n_copied += repair.n_copied
            self.outcome.longest_pause_s = max(self.outcome.longest_pause_s, repair.pause_s)
            self._world.note(f"session {plan.number}: {repair}")

    # -- faults --------------------------------------------------------------------------------

    async def _join(self, at_s: float, name: str) -> None:
        await trio.sleep(at_s)
        if name not in self._world.nodes:
            await self._world.start_node(name)

    async def _strike(self, fault: Fault) -> None:
        await trio.sleep(fault.at_s)
        world, network = self._world, self._world.network
        world.note(str(fault))
        node = world.nodes.get(fault.node)
        match fault.kind:
            case "coordinator killed":
                world.coordinators[fault.node].kill()
            case "coordinator gone":
                network.gone.add(fault.node)
                world.coordinators[fault.node].kill()
            case "part":
                network.part(fault.node, fault.other)
                await trio.sleep(fault.lasts_s)
                network.join(fault.node, fault.other)
            case "slow link":
                network.slow_down(fault.node, fault.other, 0.2)
                await trio.sleep(fault.lasts_s)
                network.slow_down(fault.node, fault.other, 0.0)
            case "flip" | "double" | "swap":
                network.spoil_next(fault.node, fault.other, fault.kind)
            case "cut":
                self._cut(fault.node, fault.other)
            case _ if node is not None and node.is_alive:
                await self._strike_node(fault)

    async def _strike_node(self, fault: Fault) -> None:
        world, network, node = self._world, self._world.network, self._world.nodes[fault.node]
        match fault.kind:
            case "kill":
                await self._kill(fault.node, fault.lasts_s)
            case "freeze":
                network.freeze(fault.node)
                await trio.sleep(fault.lasts_s)
                network.thaw(fault.node)
            case "slow node":
                node.is_slow = True
                await trio.sleep(fault.lasts_s)
                node.is_slow = False
            case "hang":
                node.working.cancel()
                await trio.sleep(fault.lasts_s)
                if world.nodes[fault.node] is node and node.is_alive:
                    await self._kill(fault.node, 0.1)
            case "not finite":
                node.engine.spoils_next = True
            case "engine fails":
                node.engine.fails_next = True
            case "doubled frame" | "early frame" | "wide frame":
                world.send_wrong_frame(fault.node, fault.kind)
            case "stray token":
                world.send_stray_token(fault.node)

    async def _kill(self, name: str, gone_s: float) -> None:
        world = self._world
        killed = world.nodes[name]
        world.kill_node(name)
        await trio.sleep(gone_s)
        await killed.ended.wait()
        if world.nodes[name] is killed:
            world.note(f"{name} is back")
            await world.start_node(name)

    def _cut(self, one: str, other: str) -> None:
        hosts = {**self._world.nodes, **self._world.coordinators}
        for name, far in ((one, other), (other, one)):
            link = hosts[name].links.get(far) if name in hosts else None
            if link is not None:
                link.close()

    # -- afterwards ----------------------------------------------------------------------------

    async def _check_nothing_left(self) -> None:
        """All sessions are over and all is well again: nothing may be held by anybody."""
        world = self._world
        world.network.heal()
        await trio.sleep(SETTLE_S)
        if world.network.gone:  # is missed when its links have been silent
            await trio.sleep(HEARTBEAT_TIMEOUT_S)
        for coordinator in world.coordinators.values():
            self._require(coordinator.user.n_sessions == 0, f"{coordinator.name} keeps a session")
        for engine in world.engines:
            self._require(
                not engine.wrong, f"an engine was asked for what is wrong: {engine.wrong}"
            )
        for node in world.nodes.values():
            if not node.is_alive:
                continue
            self._require(node.stage.n_sessions == 0, f"{node.name} keeps a session")
            n_copies = node.stage.copy_figures["n_copies"]
            self._require(n_copies == 0, f"{node.name} keeps {n_copies} copies")
            if node.working.cancel_called:
                continue  # one that hangs closes nothing
            self._require(not node.engine.open_sequences, f"{node.name} keeps KV")
            n_free = node.stage.sessions.sequences.n_free
            self._require(
                n_free == self.plan.n_parallel, f"{node.name} has {n_free} sequences free"
            )
            self._require(not node.worker._scheduler, f"{node.name} has work left")
        self._check_tasks()

    def _check_tasks(self) -> None:
        """A host runs its work and the links that are open, and nothing else."""
        hosts = [*self._world.nodes.values(), *self._world.coordinators.values()]
        for host in hosts:
            if not host.is_alive:
                continue
            names = [task.name for task in host.nursery.child_tasks]
            strange = [name for name in names if not name.endswith(("Link.run", "_greet_and_run"))]
            self._require(not strange, f"{host.name} still runs {strange}")

    def _require(self, holds: bool, sentence: str) -> None:
        if not holds:
            raise SimulationError(sentence)

    def _count(self) -> None:
        self.outcome.ended_s = trio.current_time()
        self.outcome.n_late_frames = sum(
            node.stage.counters.n_late_frames for node in self._world.nodes.values()
        )
        text = "\n".join(self.log) + f"\n{self.outcome}"
        self.outcome.digest = hashlib.sha256(text.encode()).hexdigest()


def _innermost(error: BaseException) -> BaseException:
    return _innermost(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


async def _then_cancel(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


def _preferred(plan: SessionPlan) -> list[str]:
    return [node_name(stage, replica) for stage, replica in enumerate(plan.prefers)]


def _sampling(plan: SessionPlan) -> Sampling:
    return msgspec.structs.replace(GREEDY, temperature=plan.temperature, seed=plan.n_tokens)
