"""The order of work: sessions keep theirs, none starves, decode and prefill take turns."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmesh.errors import ProtocolError
from shardmesh.listener.scheduler import Scheduler
from shardmesh.wire.limits import SESSION_BATCHES_WAITING_MAX

Item = tuple[int, int, int]  # session, number within it, tokens

sessions = st.integers(0, 5)
sizes = st.sampled_from([1, 1, 2, 32])
actions = st.lists(st.tuples(st.just("add"), sessions, sizes) | st.just(("next",)), max_size=60)


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


@given(actions, st.integers(1, 4))
def test_every_item_comes_once_in_its_sessions_order(
    todo: list[tuple[object, ...]], n_decode_round_max: int
) -> None:
    scheduler: Scheduler[Item] = Scheduler(n_decode_round_max)
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
        assert len(batch) <= n_decode_round_max


@given(st.lists(st.lists(sizes, min_size=1, max_size=8), min_size=1, max_size=6))
def test_decode_and_prefill_take_turns_while_both_have_work(plan: list[list[int]]) -> None:
    scheduler: Scheduler[Item] = Scheduler(2)
    for session, items in enumerate(plan):
        for number, n_tokens in enumerate(items):
            add(scheduler, session, number, n_tokens)
    heads = {session: list(items) for session, items in enumerate(plan)}
    was_decode: bool | None = None
    while scheduler:
        could_decode = any(items and items[0] == 1 for items in heads.values())
        could_prefill = any(items and items[0] > 1 for items in heads.values())
        batch = scheduler.next_batch()
        is_decode = batch[0][2] == 1
        if could_decode and could_prefill and was_decode is not None:
            assert is_decode != was_decode
        was_decode = is_decode
        for session, _, _ in batch:
            heads[session].pop(0)


@given(st.integers(2, 6), sizes, st.integers(1, 3))
def test_no_session_waits_for_more_than_one_round_of_the_others(
    n_sessions: int, n_tokens: int, n_decode_round_max: int
) -> None:
    scheduler: Scheduler[Item] = Scheduler(n_decode_round_max)
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


def test_a_stream_of_prompts_does_not_hold_up_decoding() -> None:
    scheduler: Scheduler[Item] = Scheduler()
    for number in range(20):
        add(scheduler, 0, number, 32)
    add(scheduler, 1, 0, 1)
    served = [scheduler.next_batch()[0][0] for _ in range(2)]
    assert 1 in served


def test_a_session_has_no_more_waiting_than_allowed() -> None:
    scheduler: Scheduler[Item] = Scheduler()
    for number in range(SESSION_BATCHES_WAITING_MAX):
        add(scheduler, 0, number, 1)
    with pytest.raises(ProtocolError) as caught:
        add(scheduler, 0, SESSION_BATCHES_WAITING_MAX, 1)
    assert caught.value.code == "TOO_MANY_BATCHES"
    add(scheduler, 1, 0, 1)  # the others are not concerned
    assert len(drain(scheduler)) == SESSION_BATCHES_WAITING_MAX


def test_what_waits_of_a_removed_session_is_gone() -> None:
    scheduler: Scheduler[Item] = Scheduler()
    for session in (0, 1):
        add(scheduler, session, 0, 1)
    scheduler.remove(name(0))
    scheduler.remove(name(7))
    assert drain(scheduler) == [[(1, 0, 1)]]
    assert scheduler.next_batch() == []
