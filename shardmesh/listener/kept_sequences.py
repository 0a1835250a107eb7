"""Which sequences of a stage are in use, empty, or kept for the prompts that they hold.  Pure.

What a finished session leaves stays in its sequence until the place is needed; the least recently
used goes first.  A kept sequence is a free one for everybody who counts.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable

from shardmesh.wire.messages import PrefixPiece

Prefix = tuple[PrefixPiece, ...]
"""The pieces of a prompt that a sequence holds, from its beginning on."""

COPY_COSTS = 1 / 256
"""Copying one position costs at most so much of computing it (tried: less than 1/1000).

A copy is always of the whole context, so a short prefix in a long one is sooner computed.
"""


@dataclasses.dataclass(frozen=True)
class Place:
    """A sequence for a new session, and what of its prompt is there already."""

    sequence: int
    n_held: int = 0  # positions
    copy_of: int | None = None  # the sequence that has them, if it is another one


class KeptSequences:
    """The sequences of one stage.  Not thread-safe."""

    def __init__(self, n_parallel: int, n_ctx: int) -> None:
        self._n_ctx = n_ctx
        self._empty = set(range(n_parallel))
        self._kept: dict[int, Prefix] = {}  # the least recently used first

    @property
    def n_free(self) -> int:
        """Sequences that a new session can have."""
        return len(self._empty) + len(self._kept)

    @property
    def n_kept(self) -> int:
        """Of them those that hold something."""
        return len(self._kept)

    def take(self, wanted: Prefix, running: Iterable[tuple[int, Prefix]] = ()) -> Place:
        """A free sequence; there must be one.

        It is the kept one that holds the most of `wanted` if nothing of that one is lost, else one
        with a copy of that part.  `running` are sequences in use and what they hold.
        """
        found = self._longest(wanted, running)
        if found is None:
            return Place(self._room())
        source, n_pieces = found
        n_held = wanted[n_pieces - 1].end
        is_whole = source in self._kept and n_pieces == len(self._kept[source])
        if is_whole or not self._pays(n_held):
            return self._without_copy(source, n_held)
        if source in self._kept:
            self._kept[source] = self._kept.pop(source)  # used just now
        room = self._room()
        return Place(room, n_held, copy_of=source if source != room else None)

    def give_back(self, sequence: int, held: Prefix = ()) -> None:
        """The session is over; the sequence holds these pieces of its prompt."""
        if held:
            self._kept[sequence] = held
        else:
            self._empty.add(sequence)

    def _longest(
        self, wanted: Prefix, running: Iterable[tuple[int, Prefix]]
    ) -> tuple[int, int] | None:
        """Who holds the most of it, and how many pieces; of equals one that nobody else needs."""
        best: tuple[int, bool] = (0, False)
        source = None
        for sequence, held in [*running, *self._kept.items()]:
            n_pieces = n_common(wanted, held)
            this = (n_pieces, sequence in self._kept and n_pieces == len(held))
            if n_pieces and this >= best:  # the last of equals was used last
                best, source = this, sequence
        return None if source is None else (source, best[0])

    def _pays(self, n_held: int) -> bool:
        return n_held >= self._n_ctx * COPY_COSTS

    def _without_copy(self, source: int, n_held: int) -> Place:
        if self._kept.pop(source, None) is None:
            return Place(self._room())  # it is in use
        return Place(source, n_held)

    def _room(self) -> int:
        """The lowest empty sequence, since neighbours are computed at once; else the oldest."""
        if self._empty:
            sequence = min(self._empty)
            self._empty.remove(sequence)
            return sequence
        sequence = next(iter(self._kept))
        del self._kept[sequence]
        return sequence


def n_common(wanted: Prefix, held: Prefix) -> int:
    """How many pieces both begin with."""
    n_pieces = 0
    for one, other in zip(wanted, held, strict=False):
        if one != other:
            break
        n_pieces += 1
    return n_pieces


def held_of(prefix: Prefix, n_computed: int) -> Prefix:
    """The pieces that are wholly computed."""
    return prefix[: bisect.bisect_right(prefix, n_computed, key=lambda piece: piece.end)]
