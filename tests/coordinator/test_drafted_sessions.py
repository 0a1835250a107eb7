"""Guesses through a chain of stages: whatever is guessed, the tokens are those without guesses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from support.loop_worker import LoopWorker
from support.mesh import GREEDY, PIECE_TOKENS, MemoryMesh, memory_mesh
from support.replicated import (
    SAMPLED,
    assert_nothing_left,
    engines,
    loop_worker,
    one_engine_tokens,
    other_last_stage,
    replicated_mesh,
)

from shardmesh.coordinator.generate import prefill
from shardmesh.coordinator.openings import SessionSettings
from shardmesh.coordinator.session import Session
from shardmesh.listener.stage_session import Work
from shardmesh.listener.worker import Calculation
from shardmesh.wire.limits import DRAFTS_MAX
from shardmesh.wire.messages import Sampling

N_VOCAB = 64
PROMPT = [i % 60 for i in range(40)]


def whole_tokens(sampling: Sampling, n_tokens: int) -> list[int]:
    """What one engine with all layers gives, without guesses."""
    return one_engine_tokens(PROMPT, n_tokens, temperature=sampling.temperature, seed=sampling.seed)


def session_of(mesh: MemoryMesh, sampling: Sampling = SAMPLED):  # type: ignore[no-untyped-def]
    return mesh.router.session(
        mesh.chain,
        mesh.links,
        SessionSettings(n_ctx=300, sampling=sampling, piece_tokens=PIECE_TOKENS),
        replacements=mesh.replacements(),
    )


Guess = Callable[[int], Sequence[int]]
"""What to guess behind so many tokens, those under way not counted."""


async def write(
    session: Session,
    n_tokens: int,
    guess: Guess,
    before: dict[int, Callable[[], None]] | None = None,
) -> list[int]:
    """Prefill and decode with guesses; `before[n]` is called when n tokens have come."""
    done = await prefill(session, PROMPT)
    tokens: list[int] = []
    while True:
        assert done.sampled is not None
        tokens.append(done.sampled.token)
        if len(tokens) == n_tokens:
            return tokens
        session.send([tokens[-1]], sample=True)
        n_ahead = len(session.guesses)
        for token in guess(len(tokens) + n_ahead):
            session.guess(token)
        if before and len(tokens) in before:
            before[len(tokens)]()
        done = await session.receive()


def guesser(expected: Sequence[int], plan: Sequence[tuple[int, int]]) -> Guess:
    """Guesses as planned: in turn (how many, which of them is wrong; none if beyond)."""
    turns = itertools.cycle(plan)

    def guess(n_known: int) -> list[int]:
        n, wrong = next(turns)
        guesses = list(expected[n_known : n_known + n])
        if wrong < len(guesses):
            guesses[wrong] = (guesses[wrong] + 1) % N_VOCAB
        return guesses[: DRAFTS_MAX // 2]

    return guess


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "plan",
    [[(4, 9)], [(4, 0)], [(4, 2)], [(1, 1), (0, 0), (3, 1)], [(8, 5), (8, 0)]],
    ids=str,
)
async def test_the_tokens_are_those_without_guesses(
    sampling: Sampling, plan: list[tuple[int, int]], autojump_clock: trio.testing.MockClock
) -> None:
    expected = whole_tokens(sampling, 20)
    async with replicated_mesh(n_spares=0) as mesh:
        async with session_of(mesh, sampling) as session:
            assert await write(session, 20, guesser(expected, plan)) == expected
            assert session.epoch == 0
        await trio.testing.wait_all_tasks_blocked()
        assert_nothing_left(mesh)


async def test_the_last_stage_computes_no_row_that_is_wrong(
    autojump_clock: trio.testing.MockClock,
) -> None:
    expected = whole_tokens(SAMPLED, 20)
    stages = engines()
    async with replicated_mesh(0, stages) as mesh, session_of(mesh) as session:
        await write(session, 20, guesser(expected, [(5, 2)]))
    assert stages[-1].n_rows == 19
    assert stages[0].n_rows > 19


async def test_right_guesses_let_the_stages_work_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def seconds(plan: list[tuple[int, int]]) -> float:
        expected = whole_tokens(SAMPLED, 20)
        async with replicated_mesh(n_spares=0) as mesh, session_of(mesh) as session:
            started_s = trio.current_time()
            await write(session, 20, guesser(expected, plan))
            return trio.current_time() - started_s

    assert await seconds([(4, 9)]) < 0.6 * await seconds([(0, 0)])


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("at", [1, 4, 9])
@pytest.mark.parametrize("plan", [[(6, 9)], [(6, 1)], [(3, 0), (6, 2)]], ids=str)
async def test_a_stage_killed_while_guesses_are_under_way(
    number: int, at: int, plan: list[tuple[int, int]], autojump_clock: trio.testing.MockClock
) -> None:
    expected = whole_tokens(SAMPLED, 24)
    async with replicated_mesh() as mesh:
        async with session_of(mesh) as session:
            kill = {at: lambda: mesh.kill(f"stage-{number}")}
            assert await write(session, 24, guesser(expected, plan), kill) == expected
            assert len(session.repairs) == 1
        await trio.testing.wait_all_tasks_blocked()
        assert_nothing_left(mesh)


async def test_all_stages_killed_one_after_the_other(
    autojump_clock: trio.testing.MockClock,
) -> None:
    expected = whole_tokens(SAMPLED, 30)
    async with replicated_mesh() as mesh:
        async with session_of(mesh) as session:
            kills = {
                n: lambda name=name: mesh.kill(name)  # type: ignore[misc]
                for n, name in [(3, "stage-2"), (4, "stage-0"), (9, "stage-1")]
            }
            guess = guesser(expected, [(6, 4), (6, 1), (2, 0)])
            assert await write(session, 30, guess, kills) == expected
            assert len(session.repairs) == 3


@pytest.mark.parametrize("at", [4, 9])
async def test_a_replacement_that_samples_otherwise_goes_on_from_what_is_known(
    at: int, autojump_clock: trio.testing.MockClock
) -> None:
    expected = whole_tokens(SAMPLED, 24)
    async with memory_mesh(engines(), [[], [], [other_last_stage()]], loop_worker) as mesh:
        async with session_of(mesh) as session:
            kill = {at: lambda: mesh.kill("stage-2")}
            tokens = await write(session, 24, guesser(expected, [(6, 9)]), kill)
    n_same = len([1 for a, b in zip(tokens, expected, strict=True) if a == b])
    assert len(tokens) == 24
    assert tokens[:at] == expected[:at]
    assert n_same < 24


async def test_a_last_stage_that_lost_its_hop_has_computed_guesses_that_nobody_heard_of(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """In the next epoch it may know more than the coordinator: nothing comes twice."""
    expected = whole_tokens(SAMPLED, 24)
    async with replicated_mesh(n_spares=0) as mesh:
        async with session_of(mesh) as session:

            async def cut() -> None:
                await trio.sleep(0.1)
                mesh.link_between(1).close()  # the hop before it ends, and comes up again

            def begin() -> None:
                mesh.nursery.start_soon(cut)

            guess = guesser(expected, [(6, 4), (6, 1)])
            assert await write(session, 24, guess, {3: begin, 8: begin}) == expected
            assert session.epoch >= 2
            assert session.repairs == []


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("every_s", [0.0007, 0.004])
async def test_guesses_may_come_at_any_moment_of_a_repair(
    number: int, every_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    """As those of a draft model do."""
    expected = whole_tokens(SAMPLED, 24)
    async with replicated_mesh() as mesh:
        async with session_of(mesh) as session:

            async def guess_on() -> None:
                for turn in itertools.count():
                    await trio.sleep(every_s)
                    n_known = session.n_sent - len(PROMPT)
                    if 0 < n_known < len(expected) and len(session.guesses) < 8:
                        wrong = turn % 5 == 0
                        session.guess((expected[n_known] + wrong) % N_VOCAB)

            other = f"stage-{(number + 1) % 3}"

            async def wake() -> None:
                await trio.sleep(0.3)
                mesh.thaw(other)

            def strike() -> None:
                mesh.kill(f"stage-{number}")
                mesh.freeze(other)  # it answers late, so the repair takes a while
                mesh.nursery.start_soon(wake)

            kill = {9: strike}
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guess_on)
                assert await write(session, 24, lambda n_known: (), kill) == expected
                nursery.cancel_scope.cancel()
            assert len(session.repairs) == 1
        session.guess(1)  # it is over: nothing happens
        await trio.testing.wait_all_tasks_blocked()
        assert_nothing_left(mesh)


plans = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=6)


@given(
    plan=plans,
    slow=st.sampled_from([0, 1, 2]),
    factor=st.sampled_from([0.1, 1.0, 7.0]),
    kill=st.none() | st.tuples(st.integers(1, 14), st.integers(0, 2)),
    temperature=st.sampled_from([0.0, 0.9]),
)
@settings(deadline=None, max_examples=60)
def test_whatever_is_guessed_and_whenever_it_comes_the_tokens_are_the_same(
    plan: list[tuple[int, int]],
    slow: int,
    factor: float,
    kill: tuple[int, int] | None,
    temperature: float,
) -> None:
    sampling = msgspec.structs.replace(GREEDY, temperature=temperature, seed=3)
    expected = whole_tokens(sampling, 16)
    workers = itertools.count()

    def worker(calculation: Calculation[Work]) -> LoopWorker:
        pace_s = 0.01 * (factor if next(workers) // 2 == slow else 1.0)
        return LoopWorker(calculation, lambda n_tokens: pace_s)

    async def run() -> None:
        spares = [[engine] for engine in engines()]
        async with memory_mesh(engines(), spares, worker) as mesh:
            before = {kill[0]: lambda: mesh.kill(f"stage-{kill[1]}")} if kill else None
            async with session_of(mesh, sampling) as session:
                assert await write(session, 16, guesser(expected, plan), before) == expected

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))
