"""The last stage hands tokens straight to the first: the same text, whatever happens meanwhile."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from support.link_messages import token_batch
from support.loop_worker import LoopWorker
from support.mesh import GREEDY, PIECE_TOKENS, MemoryMesh, memory_mesh
from support.replicated import (
    BOUNDARIES,
    SAMPLED,
    TOKEN_S,
    OtherTokens,
    assert_nothing_left,
    engines,
    loop_worker,
    one_engine_tokens,
    other_last_stage,
    replicated_mesh,
)

from shardmesh.coordinator.feed import Feed
from shardmesh.coordinator.generate import prefill
from shardmesh.coordinator.openings import SessionSettings
from shardmesh.coordinator.session import Session
from shardmesh.engine.base import MicroBatch, Output, SamplingSettings, TellToken
from shardmesh.engine.fake import FakeEngine, fake_info
from shardmesh.errors import EngineError, ShardmeshError, UnreachableError
from shardmesh.links.link import Link
from shardmesh.listener.stage_session import Work
from shardmesh.listener.worker import Calculation
from shardmesh.wire.limits import HANDED_AHEAD_MAX
from shardmesh.wire.messages import NextStage, Sampling, TokenBatch

N_VOCAB = 64
N_CTX = 300
N_TOKENS = 24
PROMPT = [i % 60 for i in range(40)]


class FailsOnceTold(FakeEngine):
    """Fails when it has told some tokens, each before it gives the output."""

    N_TOKENS = 5
    n_told = 0

    def compute(
        self, batch: Sequence[MicroBatch], tell_token: TellToken | None = None
    ) -> list[Output]:
        outputs = super().compute(batch, tell_token)
        is_told = tell_token is not None and outputs[0].sampled is not None
        self.n_told += is_told
        if is_told and self.n_told == self.N_TOKENS:
            raise EngineError("it fails, as it was told to")
        return outputs


def fails_once_told() -> FailsOnceTold:
    start, end = BOUNDARIES[-2:]
    return FailsOnceTold(fake_info(start, end, end, n_ctx=512), layer_start=start)


def sampled_behind(
    engine: FakeEngine, tokens: Sequence[int], sampling: Sampling = SAMPLED
) -> list[int]:
    """What an engine with all layers samples behind the prompt and behind each of these tokens."""
    engine.open_sequence(0, SamplingSettings(temperature=sampling.temperature, seed=sampling.seed))
    pieces = [tuple(PROMPT[:32]), tuple(PROMPT[32:]), *((token,) for token in tokens)]
    found, position = [], 0
    for number, piece in enumerate(pieces):
        micro = MicroBatch(sequence=0, position=position, tokens=piece, sample=number > 0)
        (output,) = engine.compute([micro])
        position += len(piece)
        if output.sampled is not None:
            found.append(output.sampled.token)
    return found


def whole_tokens(n_tokens: int = N_TOKENS, sampling: Sampling = SAMPLED) -> list[int]:
    """What one engine with all layers writes."""
    return one_engine_tokens(PROMPT, n_tokens, temperature=sampling.temperature, seed=sampling.seed)


EXPECTED = whole_tokens()


@asynccontextmanager
async def quick_first_mesh() -> AsyncIterator[MemoryMesh]:
    """With spares; a first stage computes a prompt again while the last one computes one token."""
    workers = itertools.count()

    def worker(calculation: Calculation[Work]) -> LoopWorker:
        pace_s = TOKEN_S / 20 if next(workers) < 2 else TOKEN_S
        return LoopWorker(calculation, lambda n_tokens: pace_s)

    async with memory_mesh(engines(), [[engine] for engine in engines()], worker) as mesh:
        yield mesh


def session_of(  # type: ignore[no-untyped-def]
    mesh: MemoryMesh, *, hands_on: bool = True, is_repaired: bool = True, **changes
):
    known = SessionSettings(
        n_ctx=N_CTX, sampling=SAMPLED, piece_tokens=PIECE_TOKENS, hands_on=hands_on
    )
    return mesh.router.session(
        mesh.chain,
        mesh.links,
        dataclasses.replace(known, **changes),
        replacements=mesh.replacements() if is_repaired else None,
    )


async def write(
    session: Session,
    n_tokens: int = N_TOKENS,
    before: dict[int, Callable[[], None]] | None = None,
    *,
    hands: Callable[[int], bool] = lambda n_so_far: True,
    guess: Callable[[int], Sequence[int]] = lambda n_known: (),
    pause_s: float = 0.0,
) -> list[int]:
    """Prefill and decode; `before[n]` is called when n tokens have come."""
    done = await prefill(session, PROMPT, hand=hands(0))
    tokens: list[int] = []
    while True:
        assert done.sampled is not None
        tokens.append(done.sampled.token)
        if len(tokens) == n_tokens:
            return tokens
        await trio.sleep(pause_s)
        session.send([tokens[-1]], sample=True, hand=hands(len(tokens)))
        for token in guess(len(tokens) + len(session.guesses)):
            session.guess(token)
        if before and len(tokens) in before:
            before[len(tokens)]()
        done = await session.receive()


def n_taken(mesh: MemoryMesh, name: str = "stage-0") -> int:
    return mesh.nodes[name].stage.counters.n_tokens_handed


def handed(session: Session, position: int, token: int, branch: int = 0) -> TokenBatch:
    return token_batch(
        session=session.session_id,
        epoch=session.epoch,
        position=position,
        tokens=(token,),
        branch=branch,
        hand=True,
    )


# -- undisturbed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("boundaries", [(0, 4), (0, 2, 4), (0, 1, 3, 4)], ids=str)
async def test_the_tokens_are_the_same_and_go_the_short_way(
    boundaries: tuple[int, ...], autojump_clock: trio.testing.MockClock
) -> None:
    stages = engines(boundaries)
    async with replicated_mesh(0, stages) as mesh:
        async with session_of(mesh) as session:
            assert await write(session) == EXPECTED
            n_handed = N_TOKENS - 1 if len(stages) > 1 else 0
            assert session.n_handed == n_handed
            assert 0 <= n_taken(mesh) - n_handed <= 1, "one beyond the last at most"
            assert session.epoch == 0
        await trio.testing.wait_all_tasks_blocked()
        assert_nothing_left(mesh)
    assert stages[0].n_rows <= N_TOKENS


async def test_nothing_is_handed_on_unless_it_was_asked_for(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with replicated_mesh(n_spares=0) as mesh:
        async with session_of(mesh, hands_on=False) as session:
            assert await write(session) == EXPECTED
        async with session_of(mesh) as session:
            assert await write(session, hands=lambda n_so_far: False) == EXPECTED
        assert n_taken(mesh) == 0


async def test_a_caller_may_change_its_mind_at_any_token(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with replicated_mesh(n_spares=0) as mesh, session_of(mesh) as session:
        assert await write(session, hands=lambda n_so_far: n_so_far % 5 < 2) == EXPECTED
        assert n_taken(mesh) > 0


async def test_stages_do_not_run_far_ahead_of_a_caller_who_does_not_read(
    autojump_clock: trio.testing.MockClock,
) -> None:
    stages = engines()
    async with replicated_mesh(0, stages) as mesh:
        async with session_of(mesh) as session:
            done = await prefill(session, PROMPT, hand=True)
            await trio.sleep(60)
            assert [stage.n_rows for stage in stages] == [HANDED_AHEAD_MAX] * 3
            tokens: list[int] = []
            while done.sampled is not None and len(tokens) < N_TOKENS:
                tokens.append(done.sampled.token)
                session.send([tokens[-1]], sample=True, hand=True)
                done = await session.receive()
            assert tokens == EXPECTED
            assert session.epoch == 0
        await trio.testing.wait_all_tasks_blocked()
        assert_nothing_left(mesh)


async def test_nothing_is_computed_beyond_the_last_token(
    autojump_clock: trio.testing.MockClock,
) -> None:
    stages = engines()
    n_ctx = len(PROMPT) + N_TOKENS
    async with replicated_mesh(0, stages) as mesh, session_of(mesh, n_ctx=n_ctx) as session:
        assert await write(session) == EXPECTED
        await trio.sleep(1)
        assert [stage.n_rows for stage in stages] == [N_TOKENS - 1] * 3


async def test_the_way_that_a_token_came_is_told(autojump_clock: trio.testing.MockClock) -> None:
    async with replicated_mesh(n_spares=0) as mesh, session_of(mesh) as session:
        await trio.sleep(2)  # for heartbeats
        first_hops_us = []
        done = await prefill(session, PROMPT, hand=True)
        for hand in (True, True, False, True, True):
            assert done.sampled is not None
            session.send([done.sampled.token], sample=True, hand=hand)
            first_hops_us.append(session.first_hop_us)
            done = await session.receive()
        assert first_hops_us[1:3] == [0, 0]


# -- together with guesses -------------------------------------------------------------------------

Guess = Callable[[int], Sequence[int]]


def guesser(plan: Sequence[tuple[int, int]]) -> Guess:
    """Guesses as planned: in turn (how many, which of them is wrong; none if beyond)."""
    turns = itertools.cycle(plan)

    def guess(n_known: int) -> list[int]:
        n, wrong = next(turns)
        guesses = list(EXPECTED[n_known : n_known + n])
        if wrong < len(guesses):
            guesses[wrong] = (guesses[wrong] + 1) % N_VOCAB
        return guesses

    return guess


@pytest.mark.parametrize(
    "plan", [[(4, 9)], [(4, 0)], [(4, 2)], [(0, 0), (0, 0), (3, 1)], [(8, 5), (0, 0)]], ids=str
)
async def test_the_tokens_are_the_same_with_guesses(
    plan: list[tuple[int, int]], autojump_clock: trio.testing.MockClock
) -> None:
    async with replicated_mesh(n_spares=0) as mesh:
        async with session_of(mesh) as session:
            assert await write(session, guess=guesser(plan)) == EXPECTED
            assert session.epoch == 0
        await trio.testing.wait_all_tasks_blocked()
        assert_nothing_left(mesh)


@pytest.mark.parametrize("is_right", [True, False])
async def test_a_guess_that_comes_behind_the_token_itself(
    is_right: bool, autojump_clock: trio.testing.MockClock
) -> None:
    async with replicated_mesh(n_spares=0) as mesh, session_of(mesh) as session:
        done = await prefill(session, PROMPT, hand=True)
        await trio.sleep(5 * TOKEN_S)  # the next one has been handed on as well
        tokens = []
        for n_known in range(1, 9):
            assert done.sampled is not None
            tokens.append(done.sampled.token)
            session.send([tokens[-1]], sample=True, hand=True)
            if not session.guesses:
                session.guess((EXPECTED[n_known] + (not is_right)) % N_VOCAB)
                session.guess(EXPECTED[n_known + 1])
            done = await session.receive()
        assert tokens == EXPECTED[:8]


# -- disturbed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("at", [1, 4, 9])
async def test_a_stage_killed_and_the_short_way_is_taken_again(
    number: int, at: int, autojump_clock: trio.testing.MockClock
) -> None:
    async with replicated_mesh() as mesh:
        async with session_of(mesh) as session:
            kill = {at: lambda: mesh.kill(f"stage-{number}")}
            assert await write(session, before=kill) == EXPECTED
            assert len(session.repairs) == 1
            assert session.n_handed > N_TOKENS - 5
            assert n_taken(mesh, session.chain.stages[0].peer_id) > N_TOKENS - at - 5
        await trio.testing.wait_all_tasks_blocked()
        assert_nothing_left(mesh)


async def test_all_stages_killed_one_after_the_other(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with replicated_mesh() as mesh, session_of(mesh) as session:
        kills = {
            n: lambda name=name: mesh.kill(name)  # type: ignore[misc]
            for n, name in [(3, "stage-2"), (4, "stage-0"), (9, "stage-1")]
        }
        assert await write(session, before=kills) == EXPECTED
        assert len(session.repairs) == 3


async def test_a_lost_short_cut_costs_no_stage_its_place(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with replicated_mesh(n_spares=0) as mesh, session_of(mesh) as session:
        cut = {5: lambda: mesh._between["stage-2", "stage-0"].close()}
        assert await write(session, before=cut) == EXPECTED
        assert (session.epoch, session.repairs) == (0, [])
        assert 3 < n_taken(mesh) < 8


async def test_a_short_cut_that_does_not_come_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def refuse(first: NextStage) -> Link:
        raise UnreachableError(f"no link to {first.peer_id}", code="NO_LINK")

    async with replicated_mesh(n_spares=0) as mesh:
        mesh.nodes["stage-2"].stage._get_link = refuse
        async with session_of(mesh) as session:
            assert await write(session) == EXPECTED
            assert (session.epoch, n_taken(mesh), session.n_handed) == (0, 0, 0)


def assert_goes_on_otherwise(tokens: Sequence[int]) -> None:
    """From some token on it is what the other machine samples behind these very tokens."""
    n_same = next(i for i, (a, b) in enumerate(zip(tokens, EXPECTED, strict=True)) if a != b)
    again = sampled_behind(OtherTokens(fake_info(n_ctx=512)), tokens)
    assert again[n_same : len(tokens)] == tokens[n_same:]


@pytest.mark.parametrize("n_lost", [1, 2, 5, 10])
async def test_what_a_lost_stage_handed_on_and_nobody_heard_of_is_not_in_the_text(
    n_lost: int, autojump_clock: trio.testing.MockClock
) -> None:
    async with memory_mesh(engines(), [[], [], [other_last_stage()]], loop_worker) as mesh:
        async with session_of(mesh) as session:
            done = await prefill(session, PROMPT, hand=True)
            (lost,) = mesh.nodes["stage-2"].stage.sessions
            lost.coordinator.send = lambda *message: None  # type: ignore[method-assign]
            await trio.sleep(3.5 * n_lost * TOKEN_S)
            assert n_taken(mesh) > n_lost
            mesh.kill("stage-2")
            tokens: list[int] = []
            while done.sampled is not None and len(tokens) < N_TOKENS:
                tokens.append(done.sampled.token)
                session.send([tokens[-1]], sample=True, hand=True)
                done = await session.receive()
            assert [repair.lost_peer_id for repair in session.repairs] == ["stage-2"]
    assert_goes_on_otherwise(tokens)


@pytest.mark.parametrize("at", range(3, 12))
async def test_what_is_computed_again_is_not_handed_on(
    at: int, autojump_clock: trio.testing.MockClock
) -> None:
    """The new last stage would hand other tokens to a new first one, which lacks them all."""
    spares = [[engines()[0]], [], [other_last_stage()]]
    async with memory_mesh(engines(), spares, loop_worker) as mesh:
        async with session_of(mesh) as session:

            def kill() -> None:
                mesh.kill("stage-0")
                mesh.kill("stage-2")

            tokens = await write(session, before={at: kill})
            assert len(session.repairs) == 2
    assert_goes_on_otherwise(tokens)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("at_s", [0.001 * n for n in range(1, 40, 3)])
async def test_what_came_before_a_repair_is_not_handed_on_behind_it(
    at_s: float, number: int, autojump_clock: trio.testing.MockClock
) -> None:
    """A guess was under way: its branch is void, which a new first stage would not know."""
    async with quick_first_mesh() as mesh, session_of(mesh) as session:

        async def kill() -> None:
            await trio.sleep(at_s)
            mesh.kill(f"stage-{number}")

        tokens = await write(
            session,
            before={2: lambda: mesh.nursery.start_soon(kill)},
            hands=lambda n_so_far: n_so_far == 2,
            guess=lambda n_known: EXPECTED[2:3] if n_known == 2 else (),
            pause_s=TOKEN_S / 5,  # the new first stage is sooner with what was handed on
        )
        assert tokens == EXPECTED
        assert [repair.lost_peer_id for repair in session.repairs] == [f"stage-{number}"]


async def test_a_last_stage_that_fails_behind_a_token_that_it_has_handed_on_is_replaced(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The first stage has the token before the last one knows how likely it was."""
    last = fails_once_told()
    async with replicated_mesh(1, [*engines()[:-1], last]) as mesh:
        async with session_of(mesh) as session:
            assert await write(session) == EXPECTED
            assert [repair.code for repair in session.repairs] == ["ENGINE_FAILED"]
            assert last.n_told == FailsOnceTold.N_TOKENS
            assert n_taken(mesh) >= last.n_told
        await trio.testing.wait_all_tasks_blocked()
        assert_nothing_left(mesh)


async def test_what_was_handed_on_by_a_session_that_failed_is_not_another_one_s(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with replicated_mesh(0, [*engines()[:-1], fails_once_told()]) as mesh:
        async with session_of(mesh, is_repaired=False) as session:
            with pytest.raises(ShardmeshError):
                await write(session)
        async with session_of(mesh) as session:
            session.send(PROMPT[:32], sample=False)
            assert not (await session.receive()).handed


async def test_a_last_stage_that_says_two_things_ends_the_session(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with replicated_mesh(n_spares=0) as mesh, session_of(mesh) as session:
        (lying,) = mesh.nodes["stage-2"].stage.sessions
        lying.first_link = None
        done = await prefill(session, PROMPT, hand=True)
        assert done.sampled is not None
        link = await mesh.link("stage-2", "stage-0")
        link.send(handed(session, len(PROMPT), (done.sampled.token + 1) % N_VOCAB))
        await trio.testing.wait_all_tasks_blocked()
        session.send([done.sampled.token], sample=True)
        with pytest.raises(ShardmeshError) as caught:
            await session.receive()
        assert caught.value.code == "OTHER_TOKEN"


async def test_a_token_that_nobody_let_it_hand_on_is_not_taken(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Not before anything was sampled, and not behind what was computed again."""
    async with replicated_mesh(n_spares=0) as mesh, session_of(mesh) as session:
        link = await mesh.link("stage-2", "stage-0")
        link.send(handed(session, 0, 1))
        await trio.testing.wait_all_tasks_blocked()

        def hand_on_what_is_next() -> None:
            link.send(handed(session, session.n_sent, 1))

        before = {3: hand_on_what_is_next}
        assert await write(session, before=before, hands=lambda n_so_far: False) == EXPECTED
        assert n_taken(mesh) == 0


async def test_tokens_that_are_not_due_change_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with replicated_mesh(n_spares=0) as mesh, session_of(mesh) as session:

        def stray() -> None:
            link = mesh._between["stage-2", "stage-0"]
            for position in (0, session.n_sent - 1, session.n_sent + 7, N_CTX, 2**31 - 1):
                for branch in (0, 9):
                    link.send(handed(session, position, 1, branch))

        assert await write(session, before={5: stray}) == EXPECTED
        assert (session.epoch, session.repairs) == (0, [])


async def test_tokens_of_a_stranger_close_its_link(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with replicated_mesh(n_spares=0) as mesh, session_of(mesh) as session:
        link = await mesh.link("stage-1", "stage-0")

        def strange() -> None:
            link.send(handed(session, session.n_sent, 1))

        assert await write(session, before={5: strange}) == EXPECTED
        assert not link.is_open


@given(
    plan=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=5),
    hands=st.lists(st.booleans(), min_size=1, max_size=5),
    slow=st.sampled_from([0, 1, 2]),
    factor=st.sampled_from([0.1, 1.0, 7.0]),
    pause_s=st.sampled_from([0.0, 0.005, 0.05]),
    kills=st.lists(
        st.tuples(st.floats(0.0, 0.6), st.sampled_from(["stage-0", "stage-1", "stage-2"])),
        max_size=2,
        unique_by=lambda kill: kill[1],
    ),
    cut_s=st.none() | st.floats(0.0, 0.6),
    temperature=st.sampled_from([0.0, 0.9]),
)
@settings(deadline=None, max_examples=60)
def test_whatever_happens_whenever_the_tokens_are_the_same(
    plan: list[tuple[int, int]],
    hands: list[bool],
    slow: int,
    factor: float,
    pause_s: float,
    kills: list[tuple[float, str]],
    cut_s: float | None,
    temperature: float,
) -> None:
    sampling = msgspec.structs.replace(GREEDY, temperature=temperature, seed=7)
    expected = whole_tokens(16, sampling)
    workers = itertools.count()
    turns = itertools.cycle(plan)

    def worker(calculation: Calculation[Work]) -> LoopWorker:
        pace_s = TOKEN_S * (factor if next(workers) // 2 == slow else 1.0)
        return LoopWorker(calculation, lambda n_tokens: pace_s)

    def guess(n_known: int) -> list[int]:
        n, wrong = next(turns)
        guesses = list(expected[n_known : n_known + n])
        if wrong < len(guesses):
            guesses[wrong] = (guesses[wrong] + 1) % N_VOCAB
        return guesses

    async def run() -> None:
        async with memory_mesh(engines(), [[engine] for engine in engines()], worker) as mesh:

            async def kill(at_s: float, name: str) -> None:
                await trio.sleep(at_s)
                mesh.kill(name)

            async def cut(at_s: float) -> None:
                await trio.sleep(at_s)
                link = mesh._between.get(("stage-2", "stage-0"))
                if link is not None:
                    link.close()

            async with session_of(mesh, sampling=sampling) as session:
                for at_s, name in kills:
                    mesh.nursery.start_soon(kill, at_s, name)
                if cut_s is not None:
                    mesh.nursery.start_soon(cut, cut_s)
                tokens = await write(
                    session,
                    16,
                    hands=lambda n_so_far: hands[n_so_far % len(hands)],
                    guess=guess,
                    pause_s=pause_s,
                )
                assert tokens == expected
            await trio.testing.wait_all_tasks_blocked()
            assert_nothing_left(mesh)

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_branch_without_guesses_keeps_what_was_sent() -> None:
    feed = Feed(bytes(16))
    feed.add([1, 2, 3], sample=True, embed=False)
    feed.begin_branch()
    assert (feed.starts, feed.n_sent) == ([0, 3], 3)
    assert feed.branches == ((1, 3),)
