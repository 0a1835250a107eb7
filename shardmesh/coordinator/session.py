"""A session over a chain: opened on every stage, fed with tokens, repaired, closed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import trio

from shardmesh.coordinator.chain import Chain, Replica
from shardmesh.coordinator.feed import Feed
from shardmesh.coordinator.openings import (
    Place,
    SessionSettings,
    open_message,
    repair_message,
)
from shardmesh.coordinator.pieces import pieces_of
from shardmesh.coordinator.recovery import (
    EMPTY,
    Held,
    HopStrikes,
    hop_lost,
    is_replaceable,
    late_stage,
    no_replica,
    plan_replay,
    stage_failed,
    stage_lost,
)
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

OPEN_TIMEOUT_S = 15.0
"""From asking all stages to their answers; a stage may have to dial the next one first."""

REPAIR_ANSWER_TIMEOUT_S = 3.0
"""The same in a repair, where those who do not answer are replaced."""

STEP_TIMEOUT_S = 120.0
"""For one micro-batch through the chain; a dead stage is noticed much sooner by its link."""

LATE_FIRST_S = 20.0
"""Without a result for so long after the start, or LATE_MULTIPLE of the longest step later on, the
stages are asked how far they are."""

LATE_MIN_S = 3.0
LATE_MULTIPLE = 8.0

N_BATCHES_IN_FLIGHT_MAX = 8
"""Micro-batches of a prompt under way at once: enough to keep all stages of a chain busy."""

INBOX_MESSAGES_MAX = 2 * SESSION_BATCHES_WAITING_MAX
"""Messages for a session that were not looked at yet; it never has so many micro-batches out."""


@dataclasses.dataclass(frozen=True)
class Suspected:
    """A link has been silent for longer than usual."""


StageEvent = BatchDone | BatchTaken | SessionOpened | SessionRepaired
StageMessage = StageEvent | HopFailed | SessionFailed
Event = StageMessage | Suspected | ShardmeshError


@dataclasses.dataclass(frozen=True)
class Repair:
    """One stage that was replaced."""

    epoch: int
    layer_start: int
    layer_end: int
    code: str  # why
    lost_peer_id: str
    new_peer_id: str
    pause_s: float  # from noticing the failure to the next result


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

    async def replace(self, chain: Chain, number: int, n_ctx: int) -> tuple[Replica, Link]:
        """A replica for that stage and a link to it; waits until there is one."""
        ...


class _BrokenError(Exception):
    """A stage must be replaced (None: only asked again)."""

    def __init__(self, number: int | None, error: ShardmeshError) -> None:
        super().__init__(number, error)
        self.number = number
        self.error = error


class Session:
    """One generation's KV on every stage of a chain."""

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
        self.n_reused = 0  # tokens of the prompt that all stages held from the beginning
        self.repairs: list[Repair] = []
        self._links = links
        self._events = events
        self._settings = settings
        self._replacements = replacements
        self._epoch = 0
        self._is_open = False
        self._is_steady = False  # open, and all stages know what to send
        self._feed = Feed(session_id)
        self._strikes = HopStrikes()
        self._held: list[Held] = [EMPTY] * len(links)
        self._longest_step_s = 0.0
        self._stepped_s = trio.current_time()
        self._unsent: _BrokenError | None = None
        self._unfinished: list[Repair] = []  # repairs after which no result has come yet

    @property
    def epoch(self) -> int:
        """How often the chain was repaired."""
        return self._epoch

    @property
    def n_sent(self) -> int:
        """Tokens sent so far, guesses included: the next position."""
        return self._feed.n_sent

    @property
    def guesses(self) -> Sequence[int]:
        """Tokens that were guessed and are not known to be right; a repair drops them."""
        return self._feed.guesses

    @property
    def first_hop_us(self) -> int:
        """Half a round trip to the first stage."""
        return self._links[0].half_round_trip_us

    @property
    def links(self) -> list[Link]:
        """Those to the chain's stages, in order."""
        return list(self._links)

    # -- what a generation uses ----------------------------------------------------------------

    async def open(self) -> None:
        """Asks all stages at once and waits until all have a sequence for the session."""
        everyone = set(range(len(self._links)))
        try:
            await self._establish(everyone, OPEN_TIMEOUT_S)
        except _BrokenError as broken:
            await self._repair(broken, everyone)
        self._is_open = True

    def send(self, tokens: Sequence[int], *, sample: bool, embed: bool = False) -> None:
        """Sends a micro-batch to the first stage; a link that fails is noticed by `receive`.

        Has the result asked for only, if it was guessed and sent before.
        """
        self._stepped_s = trio.current_time()
        with self._noticed_later():
            self._feed.add(tokens, sample=sample, embed=embed)

    def guess(self, token: int) -> None:
        """Sends what may be the next token, ahead of the result that will tell.

        Not while the chain is repaired, or when it is closed.
        """
        if not self._is_steady:
            return
        with self._noticed_later():
            self._feed.guess(token)

    async def receive(self) -> BatchDone:
        """The next micro-batch that has gone through the chain; repairs the chain if need be.

        Raises the error of the stage that failed, or UnreachableError (the moment's) when nobody
        replaces it in time or nothing comes for STEP_TIMEOUT_S.
        """
        give_up_s = trio.current_time() + STEP_TIMEOUT_S
        while True:
            try:
                with _deadline(give_up_s, "the chain did not answer in time"):
                    return self._accept(await self._next_result())
            except _BrokenError as broken:
                before = self._held
                await self._repair(broken, set())
                if broken.number is not None or self._held != before:
                    give_up_s = trio.current_time() + STEP_TIMEOUT_S

    def close(self) -> None:
        """Ends the session on all stages; not waited for."""
        self._is_steady = False
        for link in self._links:
            self._close_on(link)

    # -- results -------------------------------------------------------------------------------

    async def _next_result(self) -> tuple[int, BatchDone]:
        """What a stage gives as a result, and its number; raises _BrokenError."""
        unsent, self._unsent = self._unsent, None
        if unsent is not None:
            raise unsent
        while True:
            with trio.move_on_after(self._patience_s()) as scope:
                number, event = await self._next_event()
            if scope.cancelled_caught:
                self._longest_step_s *= 2  # asked once, it is asked again only after a longer while
                raise _BrokenError(None, UnreachableError("no result", code="STAGE_TIMEOUT"))
            if isinstance(event, BatchDone) and not self._is_again(number, event):
                return number, event
            if isinstance(event, BatchTaken) and number == 0:
                with self._first_hop():
                    self._feed.outgoing.taken(event.n_taken)

    def _is_again(self, number: int, done: BatchDone) -> bool:
        """Whether a result was here before; raises _BrokenError if it was another one then."""
        if number != len(self._links) - 1 or not self._feed.is_again(done):
            return False
        try:
            self._feed.compare(done)
            n_taken = self._feed.n_compared
            taken = BatchTaken(session=self.session_id, epoch=self._epoch, n_taken=n_taken)
        except ProtocolError as error:
            raise _BrokenError(number, error) from None
        self._send(number, taken)
        return True

    def _accept(self, result: tuple[int, BatchDone]) -> BatchDone:
        """A result that is the one asked for; raises _BrokenError for whoever gave another."""
        number, done = result
        if number != len(self._links) - 1:
            wrong = ProtocolError("a result came from another stage than the last")
            raise _BrokenError(number, wrong)
        try:
            self._feed.accept(done)
        except ProtocolError as error:
            raise _BrokenError(number, error) from None
        self._note_result(done)
        return done

    def _patience_s(self) -> float:
        if self._replacements is None:
            return float("inf")
        if not self._longest_step_s:
            return LATE_FIRST_S
        return max(LATE_MIN_S, LATE_MULTIPLE * self._longest_step_s)

    def _note_result(self, done: BatchDone) -> None:
        now_s = trio.current_time()
        self._strikes.clear()
        if self._replacements is not None:
            self._replacements.note_result(self.chain, done)
        if not self._unfinished:
            self._longest_step_s = max(self._longest_step_s, now_s - self._stepped_s)
        for repair in self._unfinished:
            self.repairs.append(dataclasses.replace(repair, pause_s=now_s - repair.pause_s))
        self._unfinished.clear()

    async def _next_event(self) -> tuple[int, StageEvent]:
        """The next good news of the current epoch and its stage; bad news is raised."""
        while True:
            link, event = await self._events.receive()
            if link not in self._links:
                continue  # replaced meanwhile
            number = self._links.index(link)
            if isinstance(event, Suspected):
                self._on_suspected(number)
            elif isinstance(event, ShardmeshError):
                raise self._lost(number, event)
            elif event.epoch != self._epoch:
                continue
            elif isinstance(event, SessionFailed):
                error = stage_failed(event)
                if not is_replaceable(error):
                    raise error
                raise _BrokenError(number, error)
            elif isinstance(event, HopFailed):
                raise self._blame(number, event)
            else:
                return number, event

    def _on_suspected(self, number: int) -> None:
        """A silent stage is replaced if another can take its place, else waited for."""
        stage = self.chain.stages[number]
        if (
            self._replacements is not None
            and self._links[number].is_suspected
            and self._replacements.has_other(stage, self._settings.n_ctx)
        ):
            raise self._lost(number, UnreachableError("it is silent", code="LINK_SILENT"))

    def _blame(self, number: int, failed: HopFailed) -> _BrokenError:
        stage = self.chain.stages[number]
        error = hop_lost(stage.layer_start, stage.layer_end, failed)
        following = self._links[min(number + 1, len(self._links) - 1)]
        is_suspect = following.is_suspected or not following.is_open
        blamed = self._strikes.blamed(number, failed, next_is_suspect=is_suspect)
        if blamed is not None and not 0 <= blamed < len(self._links):
            blamed = number  # it has no neighbour there
        return _BrokenError(blamed, error)

    # -- repair --------------------------------------------------------------------------------

    async def _repair(self, broken: _BrokenError, fresh: set[int]) -> None:
        """Raises the epoch until all stages are well and know what to send.

        `fresh` are the stages that hold nothing yet.  Raises the failure if it cannot be mended in
        time.
        """
        replacements = self._replacements
        if replacements is None:
            raise broken.error
        started_s = trio.current_time()
        failure: _BrokenError | None = broken
        try:
            with trio.fail_after(replacements.timeout_s):
                while failure is not None:
                    failure = await self._try_again((broken := failure), fresh, started_s)
        except trio.TooSlowError:
            stage = self.chain.stages[broken.number or 0]
            waited_s = trio.current_time() - started_s
            raise no_replica(
                stage.layer_start, stage.layer_end, broken.error, waited_s
            ) from broken.error

    async def _try_again(
        self, failure: _BrokenError, fresh: set[int], started_s: float
    ) -> _BrokenError | None:
        """One epoch further, without the stage that failed; what failed then."""
        try:
            if failure.number is not None:
                fresh.add(failure.number)
                await self._replace(failure.number, failure.error, started_s)
            self._epoch += 1
            is_late = failure.number is None
            await self._establish(fresh, REPAIR_ANSWER_TIMEOUT_S, is_late=is_late)
        except _BrokenError as another:
            return another
        return None

    async def _replace(self, number: int, error: ShardmeshError, started_s: float) -> None:
        replacements = self._replacements
        if replacements is None:
            raise error
        stages, lost = list(self.chain.stages), self.chain.stages[number]
        logger.info(
            "layers [%d, %d) are lost on %s: [%s] %s",
            lost.layer_start,
            lost.layer_end,
            lost.peer_id,
            error.code,
            error,
        )
        replacements.set_aside(lost, error)
        if not self._is_open and not self._has_other(number):
            raise error  # nothing is lost yet: whoever asks may ask again
        self._close_on(self._links[number])
        stages[number], link = await replacements.replace(self.chain, number, self._settings.n_ctx)
        self._links[number] = link
        self.chain = Chain(tuple(stages))
        if stages[number].fingerprint != lost.fingerprint:
            self._feed.compare_no_more()
        self._unfinished.append(
            Repair(
                epoch=self._epoch + 1,
                layer_start=lost.layer_start,
                layer_end=lost.layer_end,
                code=error.code,
                lost_peer_id=lost.peer_id,
                new_peer_id=stages[number].peer_id,
                pause_s=started_s,  # the pause is known when the next result comes
            )
        )

    async def _establish(self, fresh: set[int], timeout_s: float, *, is_late: bool = False) -> None:
        """Has all stages agree on the current epoch, then send what is missing.

        Raises _BrokenError for a stage that does not.
        """
        self._is_steady = False
        self._feed.take_back()
        while True:
            held = await self._ask_all(fresh, timeout_s)
            if self._is_open and len(held) - 1 in fresh:
                self._feed.begin_again()
            if not self._is_open:
                held = self._begin_behind(held)
            plan = plan_replay(held, self._feed.n_done)
            if not plan.restart:
                break
            fresh, self._epoch = fresh | plan.restart, self._epoch + 1
        late = late_stage(self._held, held) if is_late else None
        self._held = held
        if late is not None and self._has_other(late):
            slow = UnreachableError("the stage does not get on with its work", code="STAGE_LATE")
            raise _BrokenError(late, slow)
        n_results = self._feed.results_from(held[-1].kept_from)
        for number, send_from in enumerate((*plan.send_from[1:-1], n_results)):
            resume = ResumeSession(
                session=self.session_id,
                epoch=self._epoch,
                send_from=send_from,
                n_replay=self.n_sent if self._is_open else 0,
            )
            self._send(number, resume)
        with self._first_hop():
            outgoing = self._feed.outgoing
            outgoing.hold(self._epoch)
            outgoing.resume(self._links[0], send_from=plan.send_from[0], n_replay=self.n_sent)
        self._is_steady = True

    @contextmanager
    def _noticed_later(self) -> Iterator[None]:
        try:
            yield
        except ShardmeshError as error:
            self._unsent = self._lost(0, error)

    def _begin_behind(self, held: Sequence[Held]) -> list[Held]:
        """Has all stages begin behind what every one of them holds of the prompt."""
        prefix, n_reused = self._settings.prefix, 0
        if prefix is not None:
            n_reused = prefix.n_reusable(min(each.n_received for each in held))
        for number, each in enumerate(held):
            if each.n_received > n_reused:
                trim = TrimSession(session=self.session_id, epoch=self._epoch, n_keep=n_reused)
                self._send(number, trim)
        self._feed.begin_behind(pieces_of(prefix.tokens[:n_reused]) if prefix is not None else ())
        self.n_reused = n_reused
        return [Held(n_reused, n_reused, n_reused)] * len(held)

    @contextmanager
    def _first_hop(self) -> Iterator[None]:
        try:
            yield
        except ShardmeshError as error:
            raise self._lost(0, error) from error

    def _has_other(self, number: int) -> bool:
        replacements = self._replacements
        stage = self.chain.stages[number]
        return replacements is not None and replacements.has_other(stage, self._settings.n_ctx)

    async def _ask_all(self, fresh: set[int], timeout_s: float) -> list[Held]:
        """Opens the session on fresh stages, stops it on the others; what each of them has."""
        for number in range(len(self._links)):
            place = Place(self.session_id, self._epoch, self.chain.stages, number)
            if number in fresh:
                draft_key = self._feed.draft_key
                opening = open_message(place, self._settings, draft_key, reuse=not self._is_open)
                self._send(number, opening)
            else:
                self._send(number, repair_message(place, self._feed.branches))
        answers: dict[int, Held] = {}
        with trio.move_on_after(timeout_s) as scope:
            while len(answers) < len(self._links):
                number, event = await self._next_event()
                if isinstance(event, SessionOpened):
                    answers[number] = self._opened(number, event)
                elif isinstance(event, SessionRepaired):
                    answers[number] = Held(event.n_received, event.n_computed, event.kept_from)
        if not scope.cancelled_caught:
            return [answers[number] for number in range(len(self._links))]
        raise _BrokenError(
            self._unanswering(set(answers), fresh),
            UnreachableError("a stage did not open the session in time", code="STAGE_TIMEOUT"),
        )

    def _opened(self, number: int, event: SessionOpened) -> Held:
        if event.n_held and (self._is_open or self._settings.prefix is None):
            wrong = ProtocolError("a stage holds what it was not told of")
            raise _BrokenError(number, wrong)
        return Held(event.n_held, event.n_held, event.n_held)

    def _unanswering(self, answered: set[int], fresh: set[int]) -> int:
        """Whom to blame of those that did not answer: a new one first.

        A stage that cannot reach the next one does not answer either.
        """
        silent = [n for n in range(len(self._links)) if n not in answered]
        return next((n for n in silent if n in fresh), silent[-1])

    def _send(
        self,
        number: int,
        message: OpenSession | RepairSession | ResumeSession | TrimSession | BatchTaken,
    ) -> None:
        try:
            self._links[number].send(message)
        except ShardmeshError as error:
            raise self._lost(number, error) from None

    def _lost(self, number: int, error: ShardmeshError) -> _BrokenError:
        stage = self.chain.stages[number]
        return _BrokenError(number, stage_lost(stage.layer_start, stage.layer_end, error))

    def _close_on(self, link: Link) -> None:
        if not link.is_open:
            return
        try:
            link.send(CloseSession(session=self.session_id))
        except ShardmeshError as error:
            # A stage that cannot be told frees the session when its link ends, so end it.
            link.close(error)


@contextmanager
def _deadline(deadline_s: float, sentence: str) -> Iterator[None]:
    try:
        with trio.fail_at(deadline_s):
            yield
    except trio.TooSlowError:
        raise UnreachableError(sentence, code="STAGE_TIMEOUT") from None
