"""The stages of one session as its coordinator meets them: told, heard, blamed and replaced."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Protocol

import trio

from shardmesh.coordinator.chain import Chain, Replica
from shardmesh.coordinator.grammar_losses import GrammarLosses
from shardmesh.coordinator.openings import (
    Place,
    SessionSettings,
    open_message,
    repair_message,
)
from shardmesh.coordinator.recovery import (
    Held,
    HopStrikes,
    hop_lost,
    is_replaceable,
    stage_failed,
    stage_lost,
)
from shardmesh.coordinator.standbys import Standbys
from shardmesh.errors import ProtocolError, ShardmeshError, UnreachableError
from shardmesh.links.link import Link
from shardmesh.wire.limits import SESSION_BATCHES_WAITING_MAX
from shardmesh.wire.messages import (
    BatchDone,
    BatchTaken,
    CloseSession,
    HopFailed,
    OpenSession,
    RepairSession,
    ResumeSession,
    SessionFailed,
    SessionOpened,
    SessionRepaired,
    TrimSession,
)

logger = logging.getLogger(__name__)

INBOX_MESSAGES_MAX = 2 * SESSION_BATCHES_WAITING_MAX
"""Messages for a session that were not looked at yet; it never has so many micro-batches out."""


@dataclasses.dataclass(frozen=True)
class Suspected:
    """A link has been silent for longer than usual."""


StageEvent = BatchDone | BatchTaken | SessionOpened | SessionRepaired
StageMessage = StageEvent | HopFailed | SessionFailed
Event = StageMessage | Suspected | ShardmeshError


class Replacements(Protocol):
    """Where a session finds other replicas of a stage."""

    @property
    def timeout_s(self) -> float:
        """How long a session waits for one."""
        ...

    def has_other(self, stage: Replica, n_ctx: int) -> bool:
        """Whether another replica could take over now, as far as is known."""
        ...

    def set_aside(self, stage: Replica, error: ShardmeshError) -> None:
        """Takes a replica that failed out of the choice for a while."""
        ...

    def note_result(self, chain: Chain, done: BatchDone) -> None:
        """Learns from what the stages report of themselves."""
        ...

    def note_room(self, stages: Iterable[Replica]) -> None:
        """A session has left its places there."""
        ...

    async def replace(
        self, chain: Chain, number: int, n_ctx: int, prefer: str | None = None
    ) -> tuple[Replica, Link]:
        """A replica for that stage and a link to it, `prefer` if it is well.

        Waits until there is one.
        """
        ...

    async def standby(
        self, chain: Chain, number: int, n_ctx: int, without: Collection[str]
    ) -> tuple[Replica, Link] | None:
        """See `standbys.FindsStandbys`."""
        ...


class BrokenError(Exception):
    """A stage must be replaced (None: only asked again)."""

    def __init__(
        self,
        number: int | None,
        error: ShardmeshError,
        others: Mapping[int, ShardmeshError] = MappingProxyType({}),
    ) -> None:
        """`others` must be replaced as well."""
        super().__init__(number, error)
        self.number = number
        self.error = error
        self.others = others


class SessionStages:
    """The chain of a session and the links to it; what is wrong with a stage is a BrokenError."""

    def __init__(
        self,
        session_id: bytes,
        chain: Chain,
        links: list[Link],
        events: trio.MemoryReceiveChannel[tuple[Link, Event]],
        settings: SessionSettings,
        replacements: Replacements | None,
    ) -> None:
        """`links` is shared with the router, which takes messages of these links only."""
        self.session_id = session_id
        self.chain = chain
        self.links = links
        self.replacements = replacements
        self.epoch = 0  # events of others are passed over
        self._events = events
        self._settings = settings
        self._strikes = HopStrikes()
        self._grammar_losses = GrammarLosses(settings.sampling.grammar)
        self._took_it = set[str]()  # peer ids of the nodes that gave it a place
        self.standbys: Standbys | None = None
        if settings.standby and replacements is not None:
            self.standbys = Standbys(session_id, self, settings.n_ctx, replacements)

    @property
    def last(self) -> int:
        """The number of the last stage."""
        return len(self.links) - 1

    def send(
        self,
        number: int,
        message: OpenSession | RepairSession | ResumeSession | TrimSession | BatchTaken,
    ) -> None:
        """Tells one stage something; raises BrokenError if its link has ended or is full."""
        try:
            self.links[number].send(message)
        except ShardmeshError as error:
            raise self.lost(number, error) from None

    def lost(self, number: int, error: ShardmeshError) -> BrokenError:
        """For a stage that cannot be reached any more."""
        stage = self.chain.stages[number]
        return BrokenError(number, stage_lost(stage.layer_start, stage.layer_end, error))

    def has_other(self, number: int) -> bool:
        """Whether another replica could take that stage's place now."""
        replacements = self.replacements
        stage = self.chain.stages[number]
        return replacements is not None and replacements.has_other(stage, self._settings.n_ctx)

    async def replace(self, number: int, error: ShardmeshError, *, may_wait: bool) -> Replica:
        """Puts another replica into the chain, and gives the one that was there.

        Raises the error of the one that failed if no other is known and it may not wait for one,
        and InputError (theirs) where the session's grammar may take the next one along as well.
        """
        replacements, lost = self.replacements, self.chain.stages[number]
        if replacements is None:
            raise error
        logger.info(
            "layers [%d, %d) are lost on %s: [%s] %s",
            lost.layer_start,
            lost.layer_end,
            lost.peer_id,
            error.code,
            error,
        )
        replacements.set_aside(lost, error)
        if number == self.last:
            self._grammar_losses.note(error)
        if not may_wait and not self.has_other(number):
            raise error
        self._close_on(self.links[number])
        stages = list(self.chain.stages)
        prefer = self.standbys.peer_id_of(number) if self.standbys is not None else None
        stages[number], link = await replacements.replace(
            self.chain, number, self._settings.n_ctx, prefer
        )
        self.links[number] = link
        self.chain = Chain(tuple(stages))
        return lost

    def went_on(self) -> None:
        """A result has come: what was held against the stages is forgotten."""
        self._strikes.clear()
        self._grammar_losses.clear()

    def close(self) -> None:
        """Ends the session on all stages; not waited for."""
        if self.standbys is not None:
            self.standbys.close()
        for link in self.links:
            self._close_on(link)
        if self.replacements is not None:
            self.replacements.note_room(s for s in self.chain.stages if s.peer_id in self._took_it)

    def _close_on(self, link: Link) -> None:
        if not link.is_open:
            return
        try:
            link.send(CloseSession(session=self.session_id))
        except ShardmeshError as error:
            # A stage that cannot be told frees the session when its link ends, so end it.
            link.close(error)

    # -- what the stages say -------------------------------------------------------------------

    async def next_event(self) -> tuple[int, StageEvent]:
        """The next good news of the current epoch and its stage; bad news is raised.

        BrokenError, or the stage's own error where another replica would say the same.
        """
        while True:
            link, event = await self._events.receive()
            if link not in self.links:
                continue  # replaced meanwhile
            number = self.links.index(link)
            if isinstance(event, Suspected):
                self._on_suspected(number)
            elif isinstance(event, ShardmeshError):
                raise self.lost(number, event)
            elif event.epoch != self.epoch:
                continue
            elif isinstance(event, SessionFailed):
                error = stage_failed(event)
                if not is_replaceable(error):
                    raise error
                raise BrokenError(number, error)
            elif isinstance(event, HopFailed):
                raise self._blame(number, event)
            else:
                return number, event

    def _on_suspected(self, number: int) -> None:
        """A silent stage is replaced if another can take its place, else waited for."""
        if self.links[number].is_suspected and self.has_other(number):
            raise self.lost(number, UnreachableError("it is silent", code="LINK_SILENT"))

    def _blame(self, number: int, failed: HopFailed) -> BrokenError:
        stage = self.chain.stages[number]
        error = hop_lost(stage.layer_start, stage.layer_end, failed)
        following = self.links[min(number + 1, self.last)]
        is_suspect = following.is_suspected or not following.is_open
        blamed = self._strikes.blamed(number, failed, next_is_suspect=is_suspect)
        if blamed is not None and not 0 <= blamed <= self.last:
            blamed = number  # it has no neighbour there
        return BrokenError(blamed, error)

    # -- asking all of them --------------------------------------------------------------------

    async def open_all(self, draft_key: bytes, timeout_s: float) -> list[Held]:
        """Opens a new session on all stages; what each of them holds of the prompt.

        Raises BrokenError for a stage that does not answer, and for all at once that have no room.
        """
        everyone = set(range(len(self.links)))
        for number in everyone:
            self._open_on(number, draft_key, reuse=True)
        may_hold = self._settings.prefix is not None
        return await self._answers(everyone, everyone, timeout_s, may_hold=may_hold)

    async def stop_all(
        self,
        fresh: set[int],
        draft_key: bytes,
        branches: tuple[tuple[int, int], ...],
        timeout_s: float,
    ) -> list[Held]:
        """Stops a running session, opened on `fresh` stages now; what each of them has.

        Raises BrokenError for a stage that does not answer.
        """
        for number in range(len(self.links)):
            if number in fresh:
                self._open_on(number, draft_key, reuse=False)
            else:
                self.send(number, repair_message(self._place(number), branches))
        everyone = set(range(len(self.links)))
        return await self._answers(everyone, fresh, timeout_s, may_hold=self._settings.standby)

    async def trim(self, n_keep: Mapping[int, int], timeout_s: float) -> None:
        """Has stages forget all positions from those on, and waits until they say that they have.

        For what the stage before sends goes another way, and could be there earlier.  Raises
        BrokenError for a stage that does not answer.
        """
        for number, n in n_keep.items():
            self.send(number, TrimSession(session=self.session_id, epoch=self.epoch, n_keep=n))
        await self._answers(set(n_keep), set(), timeout_s, may_hold=False)

    def _open_on(self, number: int, draft_key: bytes, *, reuse: bool) -> None:
        self.send(number, open_message(self._place(number), self._settings, draft_key, reuse=reuse))

    def _place(self, number: int) -> Place:
        hands_on = self._settings.hands_on
        return Place(self.session_id, self.epoch, self.chain.stages, number, hands_on)

    async def _answers(
        self, asked: set[int], fresh: set[int], timeout_s: float, *, may_hold: bool
    ) -> list[Held]:
        answers: dict[int, Held] = {}
        full: dict[int, ShardmeshError] = {}
        with trio.move_on_after(timeout_s) as scope:
            while answers.keys() | full.keys() < asked:
                try:
                    number, event = await self.next_event()
                except BrokenError as broken:
                    if broken.number is None or not self._is_full(broken.number, broken.error):
                        raise
                    full[broken.number] = broken.error
                    continue
                if isinstance(event, SessionOpened):
                    if event.n_held and not may_hold:
                        wrong = ProtocolError("a stage holds what it was not told of")
                        raise BrokenError(number, wrong)
                    self._took_it.add(self.chain.stages[number].peer_id)
                    answers[number] = Held(event.n_held, event.n_held, event.n_held)
                elif isinstance(event, SessionRepaired):
                    answers[number] = Held(event.n_received, event.n_computed, event.kept_from)
        if full:
            number, error = full.popitem()
            raise BrokenError(number, error, full)
        if not scope.cancelled_caught:
            return [answers[number] for number in sorted(asked)]
        raise BrokenError(
            _unanswering(sorted(asked - answers.keys()), fresh),
            UnreachableError("a stage did not open the session in time", code="STAGE_TIMEOUT"),
        )

    def _is_full(self, number: int, error: ShardmeshError) -> bool:
        """Whether to ask another one, once the others have said if they have room."""
        return error.code == "BUSY" and self.has_other(number)


def _unanswering(silent: list[int], fresh: set[int]) -> int:
    """Whom to blame of those that did not answer: a new one first.

    A stage that cannot reach the next one does not answer either.
    """
    return next((number for number in silent if number in fresh), silent[-1])
