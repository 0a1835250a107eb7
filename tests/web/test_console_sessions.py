from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from support.roster import LAYERS, announced

from shardmesh.coordinator.chain import Chain
from shardmesh.coordinator.coordinator import Completion, replica_of
from shardmesh.coordinator.generate import Finished, Piece
from shardmesh.coordinator.repairs import Repair
from shardmesh.coordinator.timings import TimingRecorder
from shardmesh.errors import UnreachableError
from shardmesh.web.sessions import SESSIONS_FINISHED_MAX, SessionBoard
from shardmesh.wire.messages import Sampled, StageTiming

CHAIN = Chain(tuple(replica_of(announced(n)) for n in range(4)))
OTHER = Chain(tuple(replica_of(announced(n)) for n in (0, 5, 2, 3)))
REPAIR = Repair(
    epoch=1,
    layer_start=1,
    layer_end=4,
    code="LINK_LOST",
    reason="the stage closed the link",
    lost_peer_id=CHAIN.stages[1].peer_id,
    new_peer_id=OTHER.stages[1].peer_id,
    pause_s=0.25,
)
STAGES = tuple(
    StageTiming(layer_start=s, layer_end=e, queue_us=100, compute_us=1000, next_hop_us=200)
    for s, e in LAYERS
)


class Clock:
    now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(clock: Clock) -> SessionBoard:
    return SessionBoard(clock=clock, wall_clock=lambda: 1000.0 + clock.now_s)


def test_a_session_from_prompt_to_end(board: SessionBoard, clock: Clock) -> None:
    session = board.start("a", CHAIN, 12, started_s=49.0)
    shown = board.document()["a"]
    assert (shown["state"], shown["phase"], shown["n_prompt_tokens"]) == ("running", "prefill", 12)
    assert shown["started_at_s"] == 1049.0
    assert board.n_running_on(CHAIN.stages[2].peer_id) == 1

    for _ in range(11):
        session.token(STAGES, 200)
        clock.now_s += 0.01
    shown = board.document()["a"]
    assert (shown["phase"], shown["first_token_ms"], shown["n_tokens"]) == ("decode", 1000.0, 11)
    assert shown["tokens_per_s"] == pytest.approx(100, abs=0.1)
    ms = [s["queue_ms"] + s["compute_ms"] + s["wire_ms"] for s in shown["stages"]]
    assert shown["first_hop_ms"] + sum(ms) == pytest.approx(10, abs=0.01), "the parts add up"
    assert [s["compute_ms"] for s in shown["stages"]] == [1.0] * 4

    session.finish("stop")
    session.finish("cancelled")
    assert board.document()["a"]["state"] == "stop"
    assert board.n_running_on(CHAIN.stages[2].peer_id) == 0


def test_the_rate_falls_to_nothing_while_no_token_comes(board: SessionBoard, clock: Clock) -> None:
    session = board.start("a", CHAIN, 12, started_s=49.0)
    for _ in range(11):
        session.token(STAGES, 200)
        clock.now_s += 0.01
    clock.now_s += 0.9
    assert board.document()["a"]["tokens_per_s"] == pytest.approx(100, abs=0.1)
    clock.now_s += 0.2
    assert board.document()["a"]["tokens_per_s"] == 0.0
    session.token(STAGES, 200)
    assert board.document()["a"]["tokens_per_s"] > 0.0


def test_a_slow_session_has_a_rate_too(board: SessionBoard, clock: Clock) -> None:
    session = board.start("a", CHAIN, 12, started_s=49.0)
    for _ in range(3):
        clock.now_s += 4.0
        session.token(STAGES, 200)
    clock.now_s += 3.9
    assert board.document()["a"]["tokens_per_s"] == 0.2
    clock.now_s += 4.2
    assert board.document()["a"]["tokens_per_s"] == 0.0


def test_a_new_chain_starts_new_sums(board: SessionBoard, clock: Clock) -> None:
    session = board.start("a", CHAIN, 1)
    for _ in range(3):
        session.token(STAGES, 200)
        clock.now_s += 0.02
    session.repaired(OTHER, REPAIR)
    shown = board.document()["a"]
    assert (shown["n_repairs"], shown["repairs"][0]["pause_ms"]) == (1, 250.0)
    assert shown["chain"][1] == OTHER.stages[1].peer_id
    assert board.n_running_on(CHAIN.stages[1].peer_id) == 0


def test_finished_sessions_are_bounded(board: SessionBoard) -> None:
    first = board.start("first", CHAIN, 1)
    for number in range(3 * SESSIONS_FINISHED_MAX):
        board.start(str(number), CHAIN, 1).finish("stop")
    assert len(board.document()) == SESSIONS_FINISHED_MAX + 1
    assert first.is_running


def completion(*items: Piece | Finished, error: Exception | None = None) -> Completion:
    async def come() -> AsyncIterator[Piece | Finished]:
        for item in items:
            yield item
        if error is not None:
            raise error

    session = SimpleNamespace(chain=CHAIN, repairs=[])
    return Completion(session, 3, come(), tokenizer=None)  # type: ignore[arg-type]


PIECE = Piece("a", Sampled(token=1, logprob=0.0, top_logprobs=()), STAGES, 200.0)


async def test_following_a_completion(board: SessionBoard) -> None:
    finished = Finished("length", TimingRecorder(3, 0.0).finish(1.0))
    items = [i async for i in board.follow("a", completion(PIECE, PIECE, finished))]
    assert items == [PIECE, PIECE, finished]
    assert (board.document()["a"]["state"], board.document()["a"]["n_tokens"]) == ("length", 2)
    assert board.n_tokens == 2


async def test_a_failure_is_shown_with_its_code(board: SessionBoard) -> None:
    error = UnreachableError("the stage was lost", code="STAGE_LOST")
    with pytest.raises(UnreachableError):
        async for _ in board.follow("a", completion(PIECE, error=error)):
            pass
    shown = board.document()["a"]
    assert (shown["state"], shown["error"]) == ("failed", "the stage was lost [STAGE_LOST]")


async def test_a_replaced_stage_is_told(board: SessionBoard) -> None:
    told: list[tuple[str, Repair]] = []
    board.tell_repairs(lambda session, repair: told.append((session.session_id, repair)))
    source = completion(PIECE, PIECE, PIECE)
    n_items = 0
    async for _ in board.follow("a", source):
        n_items += 1
        if n_items == 1:
            source.session.chain, source.session.repairs = OTHER, [REPAIR]  # type: ignore[misc]
    assert told == [("a", REPAIR)]
    assert board.document()["a"]["chain"] == [stage.peer_id for stage in OTHER.stages]


async def test_leaving_early_is_a_cancellation(board: SessionBoard) -> None:
    source = completion(PIECE, PIECE)
    items = board.follow("a", source)
    await anext(items)
    await items.aclose()
    await source.items.aclose()  # type: ignore[attr-defined]  # as the coordinator does
    assert board.document()["a"]["state"] == "cancelled"


def test_who_looks_on_is_told_of_each_change(board: SessionBoard) -> None:
    told: list[bool] = []
    board.tell(lambda *, is_new_work: told.append(is_new_work))
    session = board.start("a", CHAIN, 1)
    session.token((), 0)
    session.finish("stop")
    assert told == [True, False, True]
