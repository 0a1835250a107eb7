"""When a session with a grammar is given up: before it takes every replica of the last stage along.

A stage that ends with an error says whose fault that was.  One that is only gone says nothing: its
memory may have been used up by the grammar that it follows, and the next one would fare no better.
"""

from __future__ import annotations

from typing import Final

from shardmesh.engine.grammar import BAD_GRAMMAR
from shardmesh.errors import InputError, ShardmeshError

REPLICAS_LOST_MAX: Final = 2
"""In a row, with no result between them: one may be chance."""

_GONE: Final = frozenset({"STAGE_LOST", "STAGE_LATE", "ENGINE_HUNG"})


class GrammarLosses:
    """Replicas of the last stage that one session has lost since its newest result."""

    def __init__(self, grammar: str) -> None:
        """`grammar` of the session, empty if it follows none; then nothing is counted."""
        self._grammar = grammar
        self._n_lost = 0

    def clear(self) -> None:
        """The session has gone on."""
        self._n_lost = 0

    def note(self, error: ShardmeshError) -> None:
        """A replica failed.  Raises InputError (theirs) if another one must not be tried."""
        if not self._grammar or error.code not in _GONE:
            return
        self._n_lost += 1
        if self._n_lost >= REPLICAS_LOST_MAX:
            raise InputError(
                f"{self._n_lost} replicas of the last stage were lost one after the other while "
                "they followed the grammar, so no other is tried",
                code=BAD_GRAMMAR,
                next_step="use a simpler grammar; the same one again only if the nodes were lost "
                "for another reason",
            ) from error
