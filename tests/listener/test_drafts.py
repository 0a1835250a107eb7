"""The last stage computes what it sampled, in order, once, and nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardmesh.listener.drafts import DraftChecks
from shardmesh.wire.draft_check import draft_check
from shardmesh.wire.limits import DRAFT_CHECK_BYTES

KEY = bytes(range(16))
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]  # what is sampled for positions 0 to 9


class LastStage:
    """Computes what is due; the token for the next position is then known."""

    def __init__(self) -> None:
        self.checks = DraftChecks(KEY)
        self.computed: list[int] = []

    def take(self, position: int, branch: int, check: bytes) -> None:
        if self.checks.is_due(position, branch, check, n_computed=len(self.computed)):
            assert position == len(self.computed)
            self.computed.append(position)
            self.checks.sampled(position + 1, TEXT[position + 1])


def check(position: int, *, right: bool = True) -> bytes:
    return draft_check(KEY, position, TEXT[position] + (not right))


def test_a_check_depends_on_key_position_and_token() -> None:
    checks = {draft_check(key, p, t) for key in (KEY, bytes(16)) for p in (0, 1) for t in (0, 1)}
    assert len(checks) == 8
    assert {len(each) for each in checks} == {DRAFT_CHECK_BYTES}


def test_a_right_draft_is_computed_and_all_behind_a_wrong_one_is_not() -> None:
    stage = LastStage()
    stage.take(0, 0, b"")
    stage.take(1, 0, check(1))
    stage.take(2, 0, check(2, right=False))
    stage.take(3, 0, check(3))
    assert stage.computed == [0, 1]
    stage.take(2, 1, b"")
    stage.take(3, 1, check(3))
    assert stage.computed == [0, 1, 2, 3]


def test_a_right_token_behind_a_wrong_one_does_not_count_though_it_comes_again() -> None:
    stage = LastStage()
    for position in range(5):
        stage.take(position, 0, check(position) if position else b"")
    # Nobody had heard of 2 to 4: they come again, another way.
    stage.take(2, 1, b"")
    stage.take(3, 1, check(3, right=False))
    stage.take(4, 1, check(4))
    stage.take(5, 1, check(5))  # right, and made of the wrong 3
    assert stage.computed == [0, 1, 2, 3, 4]
    for position in (3, 4, 5):
        stage.take(position, 2, check(position) if position > 3 else b"")
    assert stage.computed == [0, 1, 2, 3, 4, 5]


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.booleans(), max_size=6)), max_size=8))
def test_whatever_is_guessed_each_row_is_computed_once_and_made_of_right_ones(
    turns: list[tuple[int, list[bool]]],
) -> None:
    """In each turn a branch begins at the first position not known, or up to 3 before."""
    stage = LastStage()
    for branch, (n_again, guesses) in enumerate(turns):
        position = max(0, len(stage.computed) - n_again)
        stage.take(position, branch, b"")
        n_right = position + 1
        for ahead, is_right in enumerate(guesses, start=position + 1):
            if ahead + 1 >= len(TEXT):
                break
            n_right += is_right and ahead == n_right
            n_before = len(stage.computed)
            stage.take(ahead, branch, check(ahead, right=is_right))
            if len(stage.computed) > n_before:
                assert ahead < n_right  # all before it on this branch were right
        if len(stage.computed) + 2 >= len(TEXT):
            break
    assert stage.computed == list(range(len(stage.computed)))
