"""The repairs of one session, as whoever asked for its text is told of them.  Pure."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Repair:
    """One stage that was replaced."""

    epoch: int
    layer_start: int
    layer_end: int
    code: str  # why
    reason: str  # the same as a sentence
    lost_peer_id: str
    new_peer_id: str
    pause_s: float  # from noticing the failure to the next result
    n_copied: int = 0  # positions that it need not compute again, since it stood by


class RepairLog:
    """Repairs, and those after which no result has come yet; times come from the caller."""

    def __init__(self) -> None:
        self.repairs: list[Repair] = []
        self._under_way: list[Repair] = []  # in the place of the pause: when it began

    @property
    def is_under_way(self) -> bool:
        """Whether a stage was replaced, and no result has come since."""
        return bool(self._under_way)

    def begin(self, repair: Repair) -> None:
        """A stage was replaced; `pause_s` is the time at which its failure was noticed."""
        self._under_way.append(repair)

    def copied(self, peer_id: str, n_copied: int) -> None:
        """The replica that came in begins behind so many positions."""
        self._under_way = [
            dataclasses.replace(repair, n_copied=n_copied)
            if repair.new_peer_id == peer_id
            else repair
            for repair in self._under_way
        ]

    def went_on(self, now_s: float) -> None:
        """A result has come."""
        for repair in self._under_way:
            self.repairs.append(dataclasses.replace(repair, pause_s=now_s - repair.pause_s))
        self._under_way.clear()
