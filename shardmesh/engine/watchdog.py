"""What an engine is busy with, and for how long: llama.cpp cannot be stopped from outside.

The thread that calls the engine says what it begins; another one looks at it now and then.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(eq=False, slots=True)
class Call:
    """Something that an engine is asked to do, and in what time."""

    limit_s: float
    grammar: str  # that it follows, if that is all it does; else empty
    seen_s: float = 0.0


class _Within:
    """A call while it lasts; no generator, which for each token would take three times as long."""

    __slots__ = ("_call", "_calls")

    def __init__(self, calls: list[Call], call: Call) -> None:
        self._calls = calls
        self._call = call

    def __enter__(self) -> None:
        self._calls.append(self._call)

    def __exit__(self, *error: object) -> None:
        self._calls.pop()


class Watchdog:
    """The calls that are under way in one engine, the inner ones behind those that they are in."""

    def __init__(self) -> None:
        self._calls: list[Call] = []

    def within(self, limit_s: float, *, grammar: str = "") -> _Within:
        """What is done in a `with` block of it may take so long; only one thread may use this."""
        return _Within(self._calls, Call(limit_s, grammar))

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
