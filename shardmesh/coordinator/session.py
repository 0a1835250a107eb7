"""A session over a chain: opened on every stage, fed with tokens, repaired, closed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import trio

from shardmesh.coordinator.chain import Chain
from shardmesh.coordinator.feed import Feed
from shardmesh.coordinator.openings import SessionSettings
from shardmesh.coordinator.pieces import pieces_of
from shardmesh.coordinator.recovery import (
    EMPTY,
    Held,
    begin_behind_copies,
    late_stage,
    no_replica,
    plan_replay,
)
from shardmesh.coordinator.repairs import Repair, RepairLog
from shardmesh.coordinator.stages import BrokenError, SessionStages
from shardmesh.coordinator.standbys import Standbys
from shardmesh.errors import ProtocolError, ShardmeshError, UnreachableError
from shardmesh.links.link import Link
from shardmesh.wire.messages import BatchDone, BatchTaken, ResumeSession

OPEN_TIMEOUT_S = 15.0
"""From asking all stages to their answers; a stage may have to dial the next one first."""

REPAIR_ANSWER_TIMEOUT_S = 3.0
"""The same in a repair, where those who do not answer are replaced; twice as long in each further
attempt, since over a bad line a stage may need it to reach its new neighbour."""

STEP_TIMEOUT_S = 120.0
"""For one micro-batch through the chain; a dead stage is noticed much sooner by its link."""

LATE_FIRST_S = 20.0
"""Without a result for so long after the start, or LATE_MULTIPLE of the longest step later on, the
stages are asked how far they are."""

LATE_MIN_S = 3.0
LATE_MULTIPLE = 8.0

N_BATCHES_IN_FLIGHT_MAX = 8
"""Micro-batches of a prompt under way at once: enough to keep all stages of a chain busy."""


class Session:
    """One generation's KV on every stage of a chain."""

    def __init__(self, stages: SessionStages, settings: SessionSettings) -> None:
        self.session_id = stages.session_id
        self.n_reused = 0  # tokens of the prompt that all stages held from the beginning
        self.n_handed = 0  # tokens that came to the first stage straight from the last
        self._stages = stages
        self.piece_tokens = settings.piece_tokens  # of a prompt, in one micro-batch
        self._prefix = settings.prefix
        self._hands_on = settings.hands_on
        self._is_open = False
        self._is_steady = False  # open, and all stages know what to send
        self._feed = Feed(stages.session_id, settings.n_vocab)
        self._held: list[Held] = [EMPTY] * len(stages.links)
        self._longest_step_s = 0.0
        self._stepped_s = trio.current_time()
        self._is_handed, self._was_handed = False, False  # the newest token, the one before it
        self._unsent: BrokenError | None = None
        self._repairs = RepairLog()

    @property
    def chain(self) -> Chain:
        """The stages as they are now."""
        return self._stages.chain

    @property
    def repairs(self) -> list[Repair]:
        """The stages that were replaced, and by whom."""
        return self._repairs.repairs

    @property
    def epoch(self) -> int:
        """How often the chain was repaired."""
        return self._stages.epoch

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
        """Half a round trip to the first stage, if what the newest result is of went this way.

        Else it came from the last stage, which reports that hop as its own: 0.
        """
        return 0 if self._was_handed else self._stages.links[0].half_round_trip_us

    @property
    def links(self) -> list[Link]:
        """Those to the chain's stages, in order."""
        return list(self._stages.links)

    @property
    def standbys(self) -> Standbys | None:
        """The replicas that keep copies, if the session has any; to be run beside it."""
        return self._stages.standbys

    # -- what a generation uses ----------------------------------------------------------------

    async def open(self) -> None:
        """Asks all stages at once and waits until all have a sequence for the session."""
        everyone = set(range(len(self._stages.links)))
        try:
            await self._establish(everyone, OPEN_TIMEOUT_S)
        except BrokenError as broken:
            await self._repair(broken, everyone)
        self._is_open = True

    def send(
        self,
        tokens: Sequence[int],
        *,
        sample: bool,
        embed: bool = False,
        scored: Sequence[int] = (),
        hand: bool = False,
    ) -> None:
        """Sends a micro-batch to the first stage; a link that fails is noticed by `receive`.

        Has the result asked for only, if it was guessed and sent before.  The result says how
        likely the `scored` tokens are, which stand behind the first rows.  With `hand` the caller
        will send what is sampled behind it, so the last stage may do so by itself, which is sooner.
        """
        self._stepped_s = trio.current_time()
        with self._noticed_later():
            self._feed.add(tokens, sample=sample, embed=embed, scored=scored, hand=hand)

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
            except BrokenError as broken:
                before = self._held
                await self._repair(broken, set())
                if broken.number is not None or self._held != before:
                    give_up_s = trio.current_time() + STEP_TIMEOUT_S

    def close(self) -> None:
        """Ends the session on all stages; not waited for."""
        self._is_steady = False
        self._stages.close()

    # -- results -------------------------------------------------------------------------------

    async def _next_result(self) -> tuple[int, BatchDone]:
        """What a stage gives as a result, and its number; raises BrokenError."""
        unsent, self._unsent = self._unsent, None
        if unsent is not None:
            raise unsent
        while True:
            with trio.move_on_after(self._patience_s()) as scope:
                number, event = await self._stages.next_event()
            if scope.cancelled_caught:
                self._longest_step_s *= 2  # asked once, it is asked again only after a longer while
                raise BrokenError(None, UnreachableError("no result", code="STAGE_TIMEOUT"))
            if isinstance(event, BatchDone) and not self._is_again(number, event):
                return number, event
            if isinstance(event, BatchTaken) and number == 0:
                with self._first_hop():
                    self._feed.outgoing.taken(event.n_taken)

    def _is_again(self, number: int, done: BatchDone) -> bool:
        """Whether a result was here before; raises BrokenError if it was another one then."""
        if number != self._stages.last or not self._feed.is_again(done):
            return False
        try:
            self._feed.compare(done)
            n_taken = self._feed.n_compared
            taken = BatchTaken(session=self.session_id, epoch=self.epoch, n_taken=n_taken)
        except ProtocolError as error:
            raise BrokenError(number, error) from None
        self._stages.send(number, taken)
        return True

    def _accept(self, result: tuple[int, BatchDone]) -> BatchDone:
        """A result that is the one asked for; raises BrokenError for whoever gave another."""
        number, done = result
        if number != self._stages.last:
            wrong = ProtocolError("a result came from another stage than the last")
            raise BrokenError(number, wrong)
        try:
            self._feed.accept(done)
        except ProtocolError as error:
            raise BrokenError(number, error) from None
        self._note_result(done)
        return done

    def _patience_s(self) -> float:
        if self._stages.replacements is None:
            return float("inf")
        if not self._longest_step_s:
            return LATE_FIRST_S
        return max(LATE_MIN_S, LATE_MULTIPLE * self._longest_step_s)

    def _note_result(self, done: BatchDone) -> None:
        now_s = trio.current_time()
        self._stages.went_on()
        self._was_handed, self._is_handed = self._is_handed, done.handed
        self.n_handed += self._was_handed
        if self._stages.replacements is not None:
            self._stages.replacements.note_result(self.chain, done)
        if not self._repairs.is_under_way:
            self._longest_step_s = max(self._longest_step_s, now_s - self._stepped_s)
        self._repairs.went_on(now_s)

    # -- repair --------------------------------------------------------------------------------

    async def _repair(self, broken: BrokenError, fresh: set[int]) -> None:
        """Raises the epoch until all stages are well and know what to send.

        `fresh` are the stages that hold nothing yet.  Raises the failure if it cannot be mended in
        time.
        """
        replacements = self._stages.replacements
        if replacements is None:
            raise broken.error
        started_s = trio.current_time()
        failure: BrokenError | None = broken
        patience_s = REPAIR_ANSWER_TIMEOUT_S
        try:
            with trio.fail_after(replacements.timeout_s):
                while failure is not None:
                    broken = failure
                    failure = await self._try_again(broken, fresh, started_s, patience_s)
                    patience_s = min(2 * patience_s, OPEN_TIMEOUT_S)
        except trio.TooSlowError:
            stage = self.chain.stages[broken.number or 0]
            waited_s = trio.current_time() - started_s
            raise no_replica(
                stage.layer_start, stage.layer_end, broken.error, waited_s
            ) from broken.error

    async def _try_again(
        self, failure: BrokenError, fresh: set[int], started_s: float, patience_s: float
    ) -> BrokenError | None:
        """One epoch further, without the stage that failed; what failed then."""
        try:
            if failure.number is not None:
                for number, error in {failure.number: failure.error, **failure.others}.items():
                    fresh.add(number)
                    await self._replace(number, error, started_s)
            self._stages.epoch += 1
            is_late = failure.number is None
            await self._establish(fresh, patience_s, is_late=is_late)
        except BrokenError as another:
            return another
        return None

    async def _replace(self, number: int, error: ShardmeshError, started_s: float) -> None:
        # Before all is open nothing is lost yet: whoever asks may ask again.
        lost = await self._stages.replace(number, error, may_wait=self._is_open)
        new = self.chain.stages[number]
        if new.fingerprint != lost.fingerprint:
            self._feed.compare_no_more()
        self._repairs.begin(
            Repair(
                epoch=self.epoch + 1,
                layer_start=lost.layer_start,
                layer_end=lost.layer_end,
                code=error.code,
                reason=str(error),
                lost_peer_id=lost.peer_id,
                new_peer_id=new.peer_id,
                pause_s=started_s,  # the pause is known when the next result comes
            )
        )

    async def _establish(self, fresh: set[int], timeout_s: float, *, is_late: bool = False) -> None:
        """Has all stages agree on the current epoch, then send what is missing.

        Raises BrokenError for a stage that does not.
        """
        self._is_steady = False
        if self.standbys is not None:
            self.standbys.pause()
        if self._hands_on and self._is_open:
            self._feed.begin_branch()  # another last stage need not go on as this one did
        else:
            self._feed.take_back()
        while True:
            if self._is_open:
                held = await self._stop_all(fresh, timeout_s)
            else:
                held = await self._begin_behind(await self._open_all(timeout_s), timeout_s)
            plan = plan_replay(held, self._feed.n_done)
            if not plan.restart:
                break
            fresh, self._stages.epoch = fresh | plan.restart, self.epoch + 1
        late = late_stage(self._held, held) if is_late else None
        self._held = held
        if late is not None and self._stages.has_other(late):
            slow = UnreachableError("the stage does not get on with its work", code="STAGE_LATE")
            raise BrokenError(late, slow)
        n_results = self._feed.results_from(held[-1].kept_from)
        for number, send_from in enumerate((*plan.send_from[1:-1], n_results)):
            resume = ResumeSession(
                session=self.session_id,
                epoch=self.epoch,
                send_from=send_from,
                n_replay=self.n_sent if self._is_open else 0,
            )
            self._stages.send(number, resume)
        with self._first_hop():
            outgoing = self._feed.outgoing
            outgoing.hold(self.epoch)
            first = self._stages.links[0]
            outgoing.resume(first, send_from=plan.send_from[0], n_replay=self.n_sent)
        self._is_steady = True
        if self.standbys is not None:
            self.standbys.go_on(fresh)

    async def _open_all(self, timeout_s: float) -> list[Held]:
        return await self._stages.open_all(self._feed.draft_key, timeout_s)

    async def _stop_all(self, fresh: set[int], timeout_s: float) -> list[Held]:
        feed = self._feed
        held = await self._stages.stop_all(fresh, feed.draft_key, feed.branches, timeout_s)
        if self._stages.last in fresh:
            feed.begin_again()
        begun = begin_behind_copies(
            held, fresh, feed.starts, n_done=feed.n_done, n_unsampled=feed.n_unsampled
        )
        too_long = (
            n for n, (has, begins) in enumerate(zip(held, begun, strict=True)) if begins != has
        )
        await self._stages.trim({n: begun[n].n_received for n in too_long}, timeout_s)
        for number in fresh:
            self._repairs.copied(self.chain.stages[number].peer_id, begun[number].n_received)
        return begun

    @contextmanager
    def _noticed_later(self) -> Iterator[None]:
        try:
            yield
        except ShardmeshError as error:
            self._unsent = self._stages.lost(0, error)

    async def _begin_behind(self, held: Sequence[Held], timeout_s: float) -> list[Held]:
        """Has all stages begin behind what every one of them holds of the prompt."""
        prefix, n_reused = self._prefix, 0
        if prefix is not None:
            n_reused = prefix.n_reusable(min(e.n_received for e in held), self.piece_tokens)
        too_long = (number for number, each in enumerate(held) if each.n_received > n_reused)
        await self._stages.trim(dict.fromkeys(too_long, n_reused), timeout_s)
        reused = prefix.tokens[:n_reused] if prefix is not None else ()
        self._feed.begin_behind(pieces_of(reused, self.piece_tokens))
        self.n_reused = n_reused
        return [Held(n_reused, n_reused, n_reused)] * len(held)

    @contextmanager
    def _first_hop(self) -> Iterator[None]:
        try:
            yield
        except ShardmeshError as error:
            raise self._stages.lost(0, error) from error


@contextmanager
def _deadline(deadline_s: float, sentence: str) -> Iterator[None]:
    try:
        with trio.fail_at(deadline_s):
            yield
    except trio.TooSlowError:
        raise UnreachableError(sentence, code="STAGE_TIMEOUT") from None
