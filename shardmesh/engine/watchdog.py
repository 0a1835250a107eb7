"""What an engine is busy with, and for how long: llama.cpp cannot be stopped from outside.

The thread that calls the engine says what it begins; another one looks at it now and then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager


@dataclasses.dataclass(eq=False)
class Call:
    """Something that an engine is asked to do, and in what time."""

    limit_s: float
    grammar: str  # that it follows, if that is all it does; else empty
    seen_s: float = 0.0


class Watchdog:
    """The calls that are under way in one engine, the inner ones behind those that they are in."""

    def __init__(self) -> None:
        self._calls: list[Call] = []

    @contextmanager
    def within(self, limit_s: float, *, grammar: str = "") -> Iterator[None]:
        """What is done in the block may take so long; only one thread may use this."""
        self._calls.append(Call(limit_s, grammar))
        try:
            yield
        finally:
            self._calls.pop()

    def look(self, passed_s: float) -> Call | None:
        """The innermost call that takes too long, if there is one; from any thread.

        `passed_s` have passed since the last look, as far as this process ran: while it is
        stopped as a whole, no call is late.
        """
        overdue = None
        for call in tuple(self._calls):
            call.seen_s += passed_s
            if call.seen_s > call.limit_s:
                overdue = call
        return overdue
