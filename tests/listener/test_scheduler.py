"""The order of work: sessions keep theirs, none starves, decode and prefill take turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmesh.engine.at_once import with_neighbours
from shardmesh.errors import ProtocolError
from shardmesh.listener.scheduler import Scheduler, Together
from shardmesh.wire.limits import SESSION_BATCHES_WAITING_MAX

Item = tuple[int, int, int]  # session, number within it, tokens

N_AT_ONCE_MAX = 3


def alone(waiting: Sequence[Item]) -> Sequence[int]:
    return [0]


def neighbours(waiting: Sequence[Item]) -> Sequence[int]:
    return with_neighbours([session for session, _, _ in waiting], (2, N_AT_ONCE_MAX))


sessions = st.integers(0, 5)
sizes = st.sampled_from([1, 1, 2, 32])
actions = st.lists(st.tuples(st.just("add"), sessions, sizes) | st.just(("next",)), max_size=60)
ways = st.sampled_from([alone, neighbours])


def name(session: int) -> bytes:
    return bytes([session])


def add(scheduler: Scheduler[Item], session: int, number: int, n_tokens: int) -> None:
    scheduler.add(name(session), n_tokens, (session, number, n_tokens))


def drain(scheduler: Scheduler[Item]) -> list[list[Item]]:
    batches = []
    while scheduler:
        batches.append(scheduler.next_batch())
        assert len(batches) < 10_000
    return batches


@given(actions, st.integers(1, 4), ways)
def test_every_item_comes_once_in_its_sessions_order(
    todo: list[tuple[object, ...]], n_decode_round_max: int, together: Together[Item]
) -> None:
    scheduler = Scheduler(together, n_decode_round_max)
    given_items: list[Item] = []
    batches: list[list[Item]] = []
    counts: Counter[int] = Counter()
    for action in todo:
        if action[0] == "next":
            batches.append(scheduler.next_batch())
            continue
        _, session, n_tokens = action
        assert isinstance(session, int)
        assert isinstance(n_tokens, int)
        item = (session, counts[session], n_tokens)
        counts[session] += 1
        given_items.append(item)
        scheduler.add(name(session), n_tokens, item)
    batches += drain(scheduler)
    found = [item for batch in batches for item in batch]
    assert sorted(found) == sorted(given_items)
    for session in counts:
        numbers = [number for s, number, _ in found if s == session]
        assert numbers == sorted(numbers)
    for batch in batches:
        assert len({session for session, _, _ in batch}) == len(batch)
        if any(n_tokens > 1 for _, _, n_tokens in batch):
            assert len(batch) == 1  # a prompt is never mixed with other rows
        assert len(batch) <= N_AT_ONCE_MAX


@given(st.lists(st.lists(sizes, min_size=1, max_size=8), min_size=1, max_size=6), ways)
def test_decode_and_prefill_take_turns_while_both_have_work(
    plan: list[list[int]], together: Together[Item]
) -> None:
    n_decode_round_max = 2
    scheduler = Scheduler(together, n_decode_round_max)
    for session, items in enumerate(plan):
        for number, n_tokens in enumerate(items):
            add(scheduler, session, number, n_tokens)
    heads = {session: list(items) for session, items in enumerate(plan)}
    n_decode = 0  # in a row
    while scheduler:
        could_decode = any(items and items[0] == 1 for items in heads.values())
        could_prefill = any(items and items[0] > 1 for items in heads.values())
        n_decode *= could_prefill
        batch = scheduler.next_batch()
        if batch[0][2] == 1:
            n_decode += 1
            assert n_decode <= n_decode_round_max or not could_prefill
        else:
            assert n_decode or not could_decode
            n_decode = 0
        for session, _, _ in batch:
            heads[session].pop(0)


@given(st.integers(2, 6), sizes, st.integers(1, 3), ways)
def test_no_session_waits_for_more_than_one_round_of_the_others(
    n_sessions: int, n_tokens: int, n_decode_round_max: int, together: Together[Item]
) -> None:
    scheduler = Scheduler(together, n_decode_round_max)
    numbers: Counter[int] = Counter()

    def refill(session: int) -> None:
        add(scheduler, session, numbers[session], n_tokens)
        numbers[session] += 1

    for session in range(n_sessions):
        refill(session)
    last_served = dict.fromkeys(range(n_sessions), 0)
    for turn in range(1, 60):  # every session always has more to do
        for session, _, _ in scheduler.next_batch():
            assert turn - last_served[session] <= n_sessions
            last_served[session] = turn
            refill(session)
    assert min(last_served.values()) > 60 - 1 - n_sessions


def test_a_round_is_over_before_a_prompt_goes_on_however_small_its_parts() -> None:
    scheduler = Scheduler(alone)
    for session in range(5):
        add(scheduler, session, 0, 1)
        add(scheduler, session, 1, 1)
    for number in range(3):
        add(scheduler, 9, number, 32)
    assert [scheduler.next_batch()[0][0] for _ in range(12)] == [0, 1, 2, 3, 4, 9] * 2


def test_who_comes_late_goes_together_with_a_neighbour_and_holds_up_no_prompt() -> None:
    scheduler = Scheduler(neighbours)
    add(scheduler, 0, 0, 1)
    add(scheduler, 3, 0, 1)
    add(scheduler, 9, 0, 32)
    assert [session for session, _, _ in scheduler.next_batch()] == [0]
    for session in (0, 2, 4):
        add(scheduler, session, 1, 1)
    assert [session for session, _, _ in scheduler.next_batch()] == [2, 3, 4]
    assert [session for session, _, _ in scheduler.next_batch()] == [9]
    assert [session for session, _, _ in scheduler.next_batch()] == [0]


def test_a_stream_of_prompts_does_not_hold_up_decoding() -> None:
    scheduler = Scheduler(alone)
    for number in range(20):
        add(scheduler, 0, number, 32)
    add(scheduler, 1, 0, 1)
    served = [scheduler.next_batch()[0][0] for _ in range(2)]
    assert 1 in served


def test_a_session_has_no_more_waiting_than_allowed() -> None:
    scheduler = Scheduler(alone)
    for number in range(SESSION_BATCHES_WAITING_MAX):
        add(scheduler, 0, number, 1)
    with pytest.raises(ProtocolError) as caught:
        add(scheduler, 0, SESSION_BATCHES_WAITING_MAX, 1)
    assert caught.value.code == "TOO_MANY_BATCHES"
    add(scheduler, 1, 0, 1)  # the others are not concerned
    assert sum(map(len, drain(scheduler))) == SESSION_BATCHES_WAITING_MAX + 1


def test_what_waits_of_a_removed_session_is_gone() -> None:
    scheduler = Scheduler(alone)
    for session in (0, 1):
        add(scheduler, session, 0, 1)
    scheduler.remove(name(0))
    scheduler.remove(name(7))
    assert drain(scheduler) == [[(1, 0, 1)]]
    assert scheduler.next_batch() == []
