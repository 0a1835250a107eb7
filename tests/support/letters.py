"""A vocabulary for fake engines."""

from __future__ import annotations


class Letters:
    """Token n is the n-th piece; `ends` end the text."""

    def __init__(self, pieces: dict[int, bytes] | None = None, ends: frozenset[int] = frozenset()):
        self._pieces = pieces or {}
        self._ends = ends

    def piece(self, token: int) -> bytes:
        return self._pieces.get(token, b"<%d>" % token)

    def is_end(self, token: int) -> bool:
        return token in self._ends
