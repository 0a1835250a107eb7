"""What newer branches leave of older ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardmesh.links.branches import Branches

starts = st.lists(st.integers(0, 20), max_size=12)


def begun(positions: list[int]) -> Branches:
    branches = Branches()
    for branch, position in enumerate(positions, start=1):
        branches.begin(branch, position)
    return branches


@given(starts, st.integers(0, 12), st.integers(0, 20))
def test_void_is_what_any_newer_branch_took_the_place_of(
    positions: list[int], branch: int, position: int
) -> None:
    expected = any(start <= position for start in positions[branch:])
    assert begun(positions).is_void(branch, position) == expected


@given(starts, st.integers(0, 12), st.integers(0, 12), st.integers(0, 20))
def test_what_is_forgotten_concerned_older_branches_only(
    positions: list[int], until: int, branch: int, position: int
) -> None:
    branches = begun(positions)
    branches.forget_until(until)
    if branch >= until:
        expected = any(start <= position for start in positions[branch:])
        assert branches.is_void(branch, position) == expected


@given(starts, st.integers(1, 5))
def test_the_newest_rise(positions: list[int], n: int) -> None:
    newest = begun(positions).newest(n)
    assert len(newest) <= n
    assert list(newest) == sorted(newest)
    assert len({position for _, position in newest}) == len(newest)
    if positions:
        assert newest[-1] == (len(positions), positions[-1])
