"""How many guesses pay, and when none are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmesh.coordinator.drafts import (
    AUTO,
    Drafter,
    StepCost,
    drafts_worth,
    parse_drafts,
    step_cost,
)
from shardmesh.errors import InputError
from shardmesh.wire.limits import DRAFTS_MAX
from shardmesh.wire.messages import StageTiming

LONG_WAY = StepCost(step_us=150_000, stage_us=6_000)
ONE_MACHINE = StepCost(step_us=25_000, stage_us=6_000)


def stages(compute_us: int = 6_000, hop_us: int = 25_000, n: int = 4) -> tuple[StageTiming, ...]:
    return tuple(
        StageTiming(
            layer_start=i, layer_end=i + 1, queue_us=0, compute_us=compute_us, next_hop_us=hop_us
        )
        for i in range(n)
    )


def test_over_long_hops_many_are_guessed_and_on_one_machine_few() -> None:
    assert drafts_worth(0.95, LONG_WAY) == 24  # one in each stage and on each part of the way
    assert drafts_worth(0.5, LONG_WAY) == 4
    assert drafts_worth(0.95, ONE_MACHINE) == 4  # what keeps all stages busy
    assert drafts_worth(0.2, ONE_MACHINE) == 0


def test_where_nothing_is_known_or_the_stage_is_all_there_is_none_are() -> None:
    assert drafts_worth(1.0, StepCost(0, 0)) == 0
    assert drafts_worth(1.0, StepCost(20_000, 20_000)) == 0  # one busy stage
    assert drafts_worth(0.0, LONG_WAY) == 0


@given(st.floats(0, 1), st.floats(1, 1e7), st.floats(1, 1e7))
def test_more_chance_or_a_longer_way_never_means_fewer(
    chance: float, stage_us: float, way_us: float
) -> None:
    n = drafts_worth(chance, StepCost(stage_us + way_us, stage_us))
    assert 0 <= n <= DRAFTS_MAX
    assert n <= drafts_worth(min(1.0, chance + 0.1), StepCost(stage_us + way_us, stage_us))
    assert n <= drafts_worth(chance, StepCost(stage_us + 2 * way_us, stage_us))


def test_what_a_step_costs_is_in_the_timings_of_its_stages() -> None:
    assert step_cost(stages(), 25_000) == StepCost(149_000, 6_000)


class Sent:
    """A session that only remembers; `came` is what its chain answers."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.guesses: list[int] = []

    def send(self, tokens: Sequence[int], *, sample: bool, hand: bool) -> None:
        self.tokens += tokens
        if self.guesses and [self.guesses[0]] == list(tokens):
            self.guesses.pop(0)
        else:
            self.guesses.clear()

    def guess(self, token: int) -> None:
        self.guesses.append(token)


def run(
    drafter: Drafter, session: Sent, text: Sequence[int], timings: tuple[StageTiming, ...]
) -> None:
    for number, token in enumerate(text):
        drafter.note(token, timings, 25_000)
        if number + 1 < len(text):
            drafter.go_on(session, token, len(text) - number - 1)


REPEATED = [1, 2, 3, 4, 5, 6, 7, 8] * 6


def test_a_text_that_repeats_itself_is_guessed() -> None:
    drafter, session = Drafter(AUTO, [9, 9], lambda token: False), Sent()
    run(drafter, session, REPEATED, stages())
    assert session.tokens == REPEATED[:-1]
    assert drafter.n_right > len(REPEATED) / 2
    assert drafter.n_right <= drafter.n_guessed


def test_a_text_that_does_not_is_left_alone_and_so_is_a_chain_that_is_busy() -> None:
    drafter, session = Drafter(AUTO, [9, 9], lambda token: False), Sent()
    run(drafter, session, list(range(100)), stages())
    assert drafter.n_guessed == 0
    drafter, session = Drafter(AUTO, [9, 9], lambda token: False), Sent()
    run(drafter, session, REPEATED, stages(compute_us=10_000_000, n=1))
    assert drafter.n_guessed == 0


def test_wrong_guesses_make_fewer() -> None:
    drafter, session = Drafter(AUTO, [], lambda token: False), Sent()
    # After (1, 2) comes something else each time.
    run(drafter, session, [t for i in range(10, 200) for t in (1, 2, i)], stages())
    n_before = drafter.n_guessed
    run(drafter, session, [t for i in range(200, 300) for t in (1, 2, i)], stages())
    assert drafter.n_guessed == n_before


@pytest.mark.parametrize("n_drafts", [0, 1, 5])
def test_a_number_is_kept(n_drafts: int) -> None:
    drafter, session = Drafter(n_drafts, [], lambda token: False), Sent()
    longest = 0
    for number, token in enumerate(REPEATED[:-1], start=1):
        drafter.note(token, (), 0)
        drafter.go_on(session, token, len(REPEATED) - number)
        longest = max(longest, len(session.guesses))
        assert number + len(session.guesses) < len(REPEATED)  # the last token is not sent
    assert longest == n_drafts


def test_nothing_is_guessed_behind_the_end() -> None:
    drafter, session = Drafter(8, [], lambda token: token == 4), Sent()
    for token in [1, 2, 3, 4, 1, 2]:
        drafter.note(token, (), 0)
        drafter.go_on(session, token, 20)
    assert session.guesses == [3]


@pytest.mark.parametrize(("text", "n_drafts"), [("auto", AUTO), ("off", 0), ("1", 1), ("32", 32)])
def test_the_option(text: str, n_drafts: int | None) -> None:
    assert parse_drafts(text) == n_drafts


@pytest.mark.parametrize("text", ["0", "33", "-1", "many", "", "1.5", "٣"])
def test_what_the_option_is_not(text: str) -> None:
    with pytest.raises(InputError):
        parse_drafts(text)


class Model:
    """A draft model that says what it is told to, one token at a time."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int]] = []
        self.say: Callable[[int], None]

    def ask(self, text: Sequence[int], n_tokens: int, on_token: Callable[[int], None]) -> None:
        self.asked.append((list(text), n_tokens))
        self.say = on_token


def drafter_with_model(n_drafts: int | None = 3) -> tuple[Drafter, Sent, Model]:
    model = Model()
    return Drafter(n_drafts, [7, 8], lambda token: token == 0, model.ask), Sent(), model


def test_a_model_guesses_where_the_text_says_nothing() -> None:
    drafter, session, model = drafter_with_model()
    drafter.note(1, (), 0)
    drafter.go_on(session, 1, 20)
    assert model.asked == [([7, 8, 1], 3)]
    for token in (2, 3, 4, 5):
        model.say(token)
    assert session.guesses == [2, 3, 4]  # as many as are allowed
    drafter.note(2, (), 0)
    drafter.go_on(session, 2, 19)
    assert model.asked[-1] == ([7, 8, 1, 2, 3, 4], 1)
    assert (drafter.n_guessed, drafter.n_right) == (3, 1)


def test_what_a_model_says_too_late_or_behind_the_end_is_not_sent() -> None:
    drafter, session, model = drafter_with_model()
    drafter.note(1, (), 0)
    drafter.go_on(session, 1, 20)
    say = model.say
    drafter.note(2, (), 0)
    drafter.go_on(session, 2, 19)
    say(3)
    assert session.guesses == []
    model.say(0)
    assert session.guesses == []
    model.say(4)
    session.guesses.clear()  # a repair
    model.say(5)
    assert session.guesses == []


def test_a_model_that_is_mostly_wrong_only_shows_what_it_would_say() -> None:
    drafter, session, model = drafter_with_model(AUTO)
    for token in range(1000, 1100):
        drafter.note(token, stages(), 25_000)
        drafter.go_on(session, token, 500)
        model.say(5)
    n_guessed = drafter.n_guessed
    for token in range(2000, 2010):
        drafter.note(token, stages(), 25_000)
        drafter.go_on(session, token, 500)
        model.say(5)
    assert drafter.n_guessed == n_guessed
    assert model.asked[-1][1] == 1
