"""Guesses by what followed the last tokens before."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from shardmesh.coordinator.lookup import MATCH_MAX, PAIRS_KEPT, TEXT_TOKENS_MAX, LookUp

texts = st.lists(st.integers(0, 3), max_size=60)


def guess_by_looking(text: list[int], n_tokens: int) -> list[int]:
    """The same, by looking at every place: the longest match, the latest of equal ones."""
    best, source = 1, -1
    for place in range(2, len(text)):
        n = 0
        while n < min(place, MATCH_MAX) and text[place - 1 - n] == text[len(text) - 1 - n]:
            n += 1
        if n >= max(best, 2):
            best, source = n, place
    if source < 0:
        return []
    whole = list(text)
    for i in range(n_tokens):
        whole.append(whole[source + i])
    return whole[len(text) :]


@given(texts, st.integers(0, 8))
def test_the_longest_match_is_followed(text: list[int], n_tokens: int) -> None:
    # More places of one pair than are remembered would differ.
    pairs = list(itertools.pairwise(text))
    if all(pairs.count(pair) <= PAIRS_KEPT for pair in set(pairs)):
        assert LookUp(text).guess(n_tokens) == guess_by_looking(text, n_tokens)


@given(texts, texts)
def test_a_text_that_grows_is_guessed_as_far_as_it_repeats(
    begun: list[int], more: list[int]
) -> None:
    lookup = LookUp(begun)
    text = list(begun)
    for token in more:
        lookup.add(token)
        text.append(token)
        guessed = lookup.guess(4)
        assert len(guessed) == (4 if lookup.n_matched else 0)
        if lookup.n_matched:
            assert tuple(text[-2:]) in set(itertools.pairwise(text[:-1]))


def test_a_text_that_turns_in_a_circle_is_guessed_on_and_on() -> None:
    assert LookUp([5, 5, 5]).guess(4) == [5, 5, 5, 5]
    assert LookUp([1, 2, 3, 1, 2]).guess(7) == [3, 1, 2, 3, 1, 2, 3]


def test_nothing_is_guessed_by_a_single_token() -> None:
    assert LookUp([]).guess(3) == []
    assert LookUp([1, 2, 1]).guess(3) == []


def test_a_place_is_followed_as_long_as_it_comes_true() -> None:
    lookup = LookUp([1, 2, 3, 4, 9, 1, 2])
    for token in (3, 4):
        assert lookup.guess(1) == [token]
        lookup.add(token)
    assert lookup.n_matched == 4
    assert lookup.guess(2) == [9, 1]
    lookup.add(7)
    assert lookup.guess(2) == []


def test_a_long_text_is_forgotten_from_its_beginning() -> None:
    lookup = LookUp([7, 8, 9, *range(10, 10 + TEXT_TOKENS_MAX)])
    lookup.add(7)
    lookup.add(8)
    assert lookup.guess(1) == []
    for token in range(2 * TEXT_TOKENS_MAX):
        lookup.add(token)
    assert len(lookup._text) <= 2 * TEXT_TOKENS_MAX
