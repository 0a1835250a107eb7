"""Guesses what comes next by looking where the text has been before.  Pure.

What a model writes repeats itself and its prompt: names in code, keys in JSON, what it was asked to
correct or to quote.  The place where the last tokens stood before shows what followed them there.
"""

from __future__ import annotations

from collections.abc import Sequence

PAIRS_KEPT = 8
"""Places remembered for one pair of tokens, the latest; among them the longest match is chosen."""

MATCH_MAX = 16
"""Tokens that a match is followed back: a longer one says nothing more."""

TEXT_TOKENS_MAX = 8192
"""Tokens that are looked at, the latest; a longer text is forgotten down to as many."""


class LookUp:
    """A text that grows, and what followed its last tokens when they stood there before."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._start_with(tokens[-TEXT_TOKENS_MAX:])

    def add(self, token: int) -> None:
        """The text goes on."""
        if len(self._text) >= 2 * TEXT_TOKENS_MAX:
            self._start_with(self._text[-TEXT_TOKENS_MAX:])
        was_next = self._source is not None and self._text[self._source] == token
        self._text.append(token)
        self._note_pair()
        if was_next and self._source is not None:  # it goes on as it did there
            self._source += 1
            self._n_matched += 1
        else:
            self._find_source()

    @property
    def n_matched(self) -> int:
        """How many of the last tokens stood there before in this order; 0: nothing to guess by."""
        return self._n_matched

    def guess(self, n_tokens: int) -> list[int]:
        """What may come next: what followed there, which may be this very guess."""
        if self._source is None:
            return []
        guessed: list[int] = []
        for place in range(self._source, self._source + n_tokens):
            known = place < len(self._text)
            guessed.append(self._text[place] if known else guessed[place - len(self._text)])
        return guessed

    def _start_with(self, tokens: Sequence[int]) -> None:
        self._text: list[int] = []
        self._behind: dict[tuple[int, int], list[int]] = {}  # pair: positions behind it
        self._source: int | None = None  # what stands there is the guess
        self._n_matched = 0
        for token in tokens:
            self._text.append(token)
            self._note_pair()
        self._find_source()

    def _note_pair(self) -> None:
        if len(self._text) >= 2:
            places = self._behind.setdefault((self._text[-2], self._text[-1]), [])
            places.append(len(self._text))
            del places[:-PAIRS_KEPT]

    def _find_source(self) -> None:
        self._source, self._n_matched = None, 0
        if len(self._text) < 2:
            return
        here = len(self._text)
        for place in reversed(self._behind[self._text[-2], self._text[-1]]):
            n_matched = self._match(place, here) if place != here else 0
            if n_matched > self._n_matched:
                self._source, self._n_matched = place, n_matched

    def _match(self, place: int, here: int) -> int:
        """How many tokens before the two places are the same."""
        n = 0
        while n < min(place, MATCH_MAX) and self._text[place - 1 - n] == self._text[here - 1 - n]:
            n += 1
        return n
