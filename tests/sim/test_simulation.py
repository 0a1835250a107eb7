"""Two hundred simulated runs with faults; `make sim SEEDS=10000` does more.

A failure names its seed, shows what was planned and what happened, and is the same each time.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from sim import run as simulation
from sim.plan import KINDS, make_plan
from sim.run import SimulationError, simulate

from shardmesh.coordinator import session
from shardmesh.coordinator.recovery import Held, ReplayPlan, plan_replay
from shardmesh.listener import copying, kept_sequences, stage_session
from shardmesh.listener.sessions import HeldSessions

N_SEEDS = 200


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(N_SEEDS))
def test_every_session_ends_with_the_undisturbed_tokens_and_nothing_is_left(seed: int) -> None:
    simulate(seed)


def test_the_seeds_have_faults_of_every_kind() -> None:
    plans = [make_plan(seed) for seed in range(N_SEEDS)]
    assert {fault.kind for plan in plans for fault in plan.faults} == set(KINDS)
    assert any(plan.late_replicas for plan in plans)
    assert any(s.cancelled_after_s is not None for plan in plans for s in plan.sessions)


def test_the_seeds_guess_and_repair() -> None:
    outcomes = [simulate(seed) for seed in range(4)]
    assert any(outcome.n_guesses and outcome.n_repairs for outcome in outcomes)


def test_a_seed_gives_the_same_run_each_time() -> None:
    seed = 1
    assert simulate(seed).n_repairs > 0
    assert len({simulate(seed).digest for _ in range(3)}) == 1


def failing_seed() -> str:
    """What the first of a few seeds says that fails."""
    for seed in range(N_SEEDS):
        try:
            simulate(seed)
        except SimulationError as error:
            return str(error)
    return ""


@pytest.mark.slow
def test_a_replay_that_leaves_a_piece_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(held: Sequence[Held], n_done: int) -> ReplayPlan:
        plan = plan_replay(held, n_done)
        return ReplayPlan((plan.send_from[0] + 1, *plan.send_from[1:]), plan.restart)

    monkeypatch.setattr(session, "plan_replay", forgetful)
    assert "make sim FIRST=" in failing_seed()


@pytest.mark.slow
def test_a_sequence_that_is_not_given_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    release = HeldSessions.release

    def leak(sessions: HeldSessions, released, **how) -> None:  # type: ignore[no-untyped-def]
        release(sessions, released, **how)
        sessions.sequences.take(())

    monkeypatch.setattr(HeldSessions, "release", leak)
    assert failing_seed()


@pytest.mark.slow
def test_a_prefix_of_another_prompt_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_sequences, "n_common", lambda one, other: min(len(one), len(other)))
    assert failing_seed()


def test_the_seeds_reuse_prefixes() -> None:
    assert any(simulate(seed).n_reused for seed in range(N_SEEDS))


def test_the_seeds_take_over_with_copies() -> None:
    assert any(simulate(seed).n_copied for seed in range(N_SEEDS))


@pytest.mark.slow
def test_a_copy_of_guesses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "STEP_TOKENS_MIN", 1)
    monkeypatch.setattr(stage_session, "n_final", lambda n_received, first: n_received)
    assert failing_seed()


def test_the_seeds_hand_tokens_on_and_repair() -> None:
    outcomes = [simulate(seed) for seed in range(6)]
    assert any(outcome.n_handed and outcome.n_repairs for outcome in outcomes)


def test_the_reference_is_one_engine() -> None:
    tokens = simulation.undisturbed((1, 2, 3), 5, 0.0)
    assert tokens == simulation.undisturbed((1, 2, 3), 9, 0.0)[:5]
