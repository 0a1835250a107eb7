"""Finding stop strings in text that comes in pieces.  Pure."""

from __future__ import annotations

from collections.abc import Sequence

from shardmesh.errors import InputError
from shardmesh.wire.limits import STOP_STRINGS_MAX

STOP_CHARACTERS_MAX = 256


class StopScanner:
    """Holds back what may yet turn out to be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises InputError (theirs) for empty, too long or too many stop strings."""
        if len(stops) > STOP_STRINGS_MAX:
            raise InputError(
                f"{len(stops)} stop strings were given, {STOP_STRINGS_MAX} are allowed"
            )
        for stop in stops:
            if not 0 < len(stop) <= STOP_CHARACTERS_MAX:
                raise InputError(
                    f"a stop string has 1 to {STOP_CHARACTERS_MAX} characters",
                    next_step="leave the empty one out, or shorten the long one",
                )
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Text that can be shown now, and whether a stop string was met (it is not shown).

        Of several the one that is complete first counts, of these the longest: so the answer does
        not depend on how the text was cut.
        """
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, start = min(found)
            shown, self._held = self._held[:start], ""
            return shown, True
        n_keep = max((self._n_begun(stop) for stop in self._stops), default=0)
        cut = len(self._held) - n_keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """What was held back, when nothing more comes."""
        shown, self._held = self._held, ""
        return shown

    def _n_begun(self, stop: str) -> int:
        """Length of the longest end of the held text that begins the stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
