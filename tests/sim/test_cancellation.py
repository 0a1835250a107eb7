"""A user who goes away at any point of a generation leaves nothing behind, on any node."""

from __future__ import annotations

import itertools
import random

import pytest
import trio
from sim.network import Network
from sim.plan import coordinator_name, node_name
from sim.schedule import run_seeded
from sim.world import BOUNDARIES, N_CTX, World
from support.mesh import GREEDY, PIECE_TOKENS

from shardmesh.coordinator.generate import prefill
from shardmesh.coordinator.openings import SessionSettings

PROMPT = tuple(range(40))
N_TOKENS = 3
SEED = 1
SETTLE_S = 1.0
STEP = 13
"""Every thirteenth step of a run, each kind of step is met by some; all would take minutes."""


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope when the tasks of a run have made that many steps since the start."""

    def __init__(self, step: int) -> None:
        self._step = step
        self.scope = trio.CancelScope()
        self.n_steps = 0

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.n_steps += 1
        if self.n_steps == self._step:
            self.scope.cancel()


async def generate_and_cancel(at_step: int, *, kill: bool) -> bool:
    """Whether the generation was over before that step; checks what is left then."""
    cancel = CancelAtStep(at_step)
    async with trio.open_nursery() as nursery:
        world = World(nursery, Network(random.Random(SEED)), n_parallel=2)
        await world.start_coordinator(coordinator_name(0))
        for stage, replica in itertools.product(range(len(BOUNDARIES) - 1), range(2)):
            await world.start_node(node_name(stage, replica))
        coordinator = world.coordinators[coordinator_name(0)]
        with cancel.scope:
            trio.lowlevel.add_instrument(cancel)
            chain, links = await world.chain(coordinator, [])
            finder = world.finder(coordinator, 10.0)
            settings = SessionSettings(
                n_ctx=N_CTX, sampling=GREEDY, piece_tokens=PIECE_TOKENS, hands_on=True
            )
            async with coordinator.user.session(chain, links, settings, finder) as session:
                done = await prefill(session, PROMPT, hand=True)
                for number in range(N_TOKENS):
                    if kill and number == 0:
                        world.kill_node(chain.stages[1].peer_id)
                    assert done.sampled is not None
                    session.send([done.sampled.token], sample=True, hand=True)
                    done = await session.receive()
        trio.lowlevel.remove_instrument(cancel)
        await trio.sleep(SETTLE_S)
        assert coordinator.user.n_sessions == 0
        for node in world.nodes.values():
            if node.is_alive:
                assert node.stage.n_sessions == 0
                assert not node.engine.open_sequences
                assert node.stage.sessions.sequences.n_free == 2
                assert not node.worker._scheduler
        nursery.cancel_scope.cancel()
    return not cancel.scope.cancelled_caught


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True], ids=["undisturbed", "in a repair"])
def test_nothing_is_left_wherever_a_generation_is_cancelled(kill: bool) -> None:
    for n_runs, step in enumerate(itertools.count(1, STEP)):

        async def run(step: int = step) -> bool:
            return await generate_and_cancel(step, kill=kill)

        if run_seeded(SEED, run):
            assert n_runs > 20
            return
