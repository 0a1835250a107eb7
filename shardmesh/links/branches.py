"""Where the branches of a session began.  Pure.

A coordinator that guessed wrong begins a new branch at the position of the wrong guess: what older
branches have from there on is void.
"""

from __future__ import annotations

import bisect


class Branches:
    """The branches that began, as far as an older one is still of interest."""

    def __init__(self) -> None:
        self._begun: list[tuple[int, int]] = []  # (branch, position), both rising

    def begin(self, branch: int, position: int) -> None:
        """A branch, newer than all before, has begun."""
        while self._begun and self._begun[-1][1] >= position:
            self._begun.pop()
        self._begun.append((branch, position))

    def is_void(self, branch: int, position: int) -> bool:
        """Whether what this branch has at the position is replaced by that of a newer one."""
        index = bisect.bisect_right(self._begun, branch, key=lambda begun: begun[0])
        return index < len(self._begun) and self._begun[index][1] <= position

    def forget_until(self, branch: int) -> None:
        """Nothing of an older branch than this one will be asked about."""
        while self._begun and self._begun[0][0] <= branch:
            self._begun.pop(0)

    def newest(self, n: int) -> tuple[tuple[int, int], ...]:
        """The last `n` as (branch, position), both rising."""
        return tuple(self._begun[-n:])
