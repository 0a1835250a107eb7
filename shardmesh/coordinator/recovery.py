"""What to do when a stage fails: whom to blame, and who sends what again.  Pure.

A stage that failed is replaced; the others keep what they hold.  Every stage keeps what it sent
(`links/outgoing.py`), so the replacement gets its input from the stage before it, computes it in
the original micro-batches, and sends on only what the stage behind it lacks.  The last stage
samples again while it computes again, which brings its sampler into the state that it had.  One
that stood by for the lost stage has a copy of its KV, and computes the tail only.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Collection, Sequence

from shardmesh.errors import ShardmeshError, UnreachableError, error_from_wire
from shardmesh.wire.messages import HopFailed, SessionFailed

REPLACEABLE_CODES = frozenset({"WRONG_SHARD", "WRONG_CHAIN", "NO_ADAPTER"})
"""Errors with blame theirs that another replica need not have: this one serves something else."""

_LINK_CODES = ("LINK_LOST", "LINK_SILENT", "LINK_TIMEOUT", "LINK_CLOSED")
_RUN_AGAIN = "run the prompt again once `shardmesh status` says that the pipeline is complete"


@dataclasses.dataclass(frozen=True)
class Held:
    """What a stage has of a session."""

    n_received: int  # the position that must come next
    n_computed: int
    kept_from: int  # it can send again from here on


EMPTY = Held(0, 0, 0)


@dataclasses.dataclass(frozen=True)
class ReplayPlan:
    """From which position each hop is sent again; the first is the coordinator's own."""

    send_from: tuple[int, ...]  # of the coordinator, then of each stage
    restart: frozenset[int]  # stages that must begin anew, since they no longer have what is needed


def plan_replay(held: Sequence[Held], n_done: int) -> ReplayPlan:
    """Who sends again from where, so that each stage gets what it lacks and nothing twice.

    `held` are the stages in order; the coordinator has the results of all positions below `n_done`.
    """
    needed, restart, send_from = n_done, set(), []
    for number in range(len(held) - 1, -1, -1):
        send_from.append(needed)
        if held[number].kept_from > needed:
            restart.add(number)
            needed = 0
        else:
            needed = held[number].n_received
    return ReplayPlan((needed, *reversed(send_from)), frozenset(restart))


def begin_behind_copies(
    held: Sequence[Held],
    fresh: Collection[int],
    starts: Sequence[int],
    *,
    n_done: int,
    n_unsampled: int,
) -> list[Held]:
    """Behind which positions stages begin that took over with a copy; the others as they are.

    `starts` are the positions where micro-batches begin, rising from 0 on: only there can one go on
    with the same bits.  A stage also gives what the one behind it lacks, so it begins there at the
    latest; and a last stage samples again all that was sampled, which is what lies behind
    `n_unsampled`.
    """
    begun, needed = list[Held](), n_done
    for number in reversed(range(len(held))):
        each = held[number]
        if number in fresh and each.n_received:
            n_most = min(each.n_received, needed)
            if number == len(held) - 1:
                n_most = min(n_most, n_unsampled)
            n_begun = starts[max(0, bisect.bisect_right(starts, n_most) - 1)] if starts else 0
            each = Held(n_begun, n_begun, n_begun)
        begun.append(each)
        needed = each.n_received
    return begun[::-1]


def late_stage(before: Sequence[Held], now: Sequence[Held]) -> int | None:
    """The first stage that has work and has done none of it between two looks."""
    for number, (earlier, later) in enumerate(zip(before, now, strict=True)):
        if later.n_computed == earlier.n_computed < earlier.n_received:
            return number
    return None


class HopStrikes:
    """Whom to replace when a link between two stages fails, though both may be well."""

    def __init__(self) -> None:
        self._n_strikes: dict[int, int] = {}

    def clear(self) -> None:
        """The session has gone on: what was is forgotten."""
        self._n_strikes.clear()

    def blamed(self, number: int, failed: HopFailed, *, next_is_suspect: bool) -> int | None:
        """The stage to replace when `number` reports a neighbour; None: try the same once more.

        Who sends what cannot be right is replaced at once, and so is the far end of a lost link
        that is silent to the coordinator as well.  Else the link may come up again; then the far
        end is tried elsewhere, then the reporting stage.
        """
        if failed.hop == "previous":
            return number - 1
        if next_is_suspect:
            return number + 1
        n_before = self._n_strikes.get(number, 0)
        self._n_strikes[number] = n_before + 1
        if n_before == 0:
            return None
        return number + 1 if n_before % 2 else number


def is_replaceable(error: ShardmeshError) -> bool:
    """Whether another replica might do what a stage reports that it cannot."""
    return error.blame != "theirs" or error.code in REPLACEABLE_CODES


def stage_lost(layer_start: int, layer_end: int, cause: ShardmeshError) -> UnreachableError:
    """The error for a stage that is gone."""
    return UnreachableError(
        f"the stage with layers [{layer_start}, {layer_end}) was lost: {cause}",
        code="STAGE_LOST",
        next_step=_RUN_AGAIN,
    )


def stage_failed(event: SessionFailed) -> ShardmeshError:
    """What a stage reports of itself."""
    if event.blame == "moment" and not event.next_step:
        sentence = f"layers [{event.layer_start}, {event.layer_end}): {event.message}"
        return error_from_wire(event.code, event.blame, sentence, _RUN_AGAIN)
    return event.error()


def hop_lost(layer_start: int, layer_end: int, failed: HopFailed) -> ShardmeshError:
    """The error of a stage about its neighbour, for a session that cannot be repaired."""
    if failed.hop == "next" and failed.code in _LINK_CODES:
        return UnreachableError(
            f"the stage behind layers [{layer_start}, {layer_end}) was lost: {failed.error()}",
            code="STAGE_LOST",
            next_step=_RUN_AGAIN,
        )
    return failed.error()


def no_replica(
    layer_start: int, layer_end: int, cause: ShardmeshError, waited_s: float
) -> UnreachableError:
    """The error when nobody came to take the place of a stage."""
    return UnreachableError(
        f"the stage with layers [{layer_start}, {layer_end}) was lost, and no other replica of it "
        f"came within {waited_s:.1f} s: {cause}",
        code="STAGE_LOST",
        next_step=_RUN_AGAIN,
    )
