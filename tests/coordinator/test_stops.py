"""Stop strings: the same end of the text, however it was cut on its way."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardmesh.coordinator.stops import STOP_CHARACTERS_MAX, StopScanner
from shardmesh.errors import InputError
from shardmesh.wire.limits import STOP_STRINGS_MAX

letters = st.text("ab", max_size=30)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def search(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first; of these the longest."""
    for end in range(1, len(text) + 1):
        met = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if met:
            return text[: end - max(met)], True
    return text, False


def scan(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    scanner = StopScanner(stops)
    shown = ""
    for piece in pieces:
        text, is_stopped = scanner.feed(piece)
        shown += text
        if is_stopped:
            return shown, True
    return shown + scanner.flush(), False


@given(letters, stop_lists, st.lists(st.integers(0, 30), max_size=8))
@example("abab", ["abab", "ba"], [])
def test_it_is_the_same_however_the_text_was_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    anywhere = [text[a:b] for a, b in itertools.pairwise(borders)]
    for pieces in ([text], list(text), anywhere):
        assert scan(pieces, stops) == search(text, stops)


@given(letters, stop_lists)
def test_only_a_possible_beginning_is_held_back(text: str, stops: list[str]) -> None:
    scanner = StopScanner(stops)
    shown, is_stopped = scanner.feed(text)
    held = scanner.flush()
    if not is_stopped:
        assert shown + held == text
        assert not held or any(stop.startswith(held) for stop in stops)


def test_text_behind_a_stop_string_is_not_shown_later() -> None:
    scanner = StopScanner(["."])
    assert scanner.feed("one. two") == ("one", True)
    assert scanner.flush() == ""


@pytest.mark.parametrize(
    "stops", [[""], ["x" * (STOP_CHARACTERS_MAX + 1)], ["x"] * (STOP_STRINGS_MAX + 1)]
)
def test_stop_strings_past_a_limit_are_refused(stops: list[str]) -> None:
    with pytest.raises(InputError):
        StopScanner(stops)
    StopScanner(["x" * STOP_CHARACTERS_MAX] * STOP_STRINGS_MAX)
