"""How a command ends by a signal: as by Ctrl-C, with all that it cleans up behind it."""

from __future__ import annotations

import signal
from types import FrameType

_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""What `kill` and a closed terminal send; by themselves they end a process where it stands."""


class Endings:
    """Has SIGTERM and SIGHUP act as Ctrl-C does, and remembers which one came."""

    def __init__(self) -> None:
        self._number = signal.SIGINT

    def heed(self) -> None:
        """From now on; a signal that is ignored, as with nohup, stays so."""
        for number in _ENDING:
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, self._interrupt)

    @property
    def exit_code(self) -> int:
        """What a shell calls an end by the signal that came: 130 is Ctrl-C, 143 SIGTERM."""
        return 128 + self._number

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a script
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._number = signal.Signals(number)
        signal.raise_signal(signal.SIGINT)  # trio has made that one safe at any point
