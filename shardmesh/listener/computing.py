"""A stage's part in the worker's thread: micro-batches through the engine, results on their way."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Protocol, TypeVar

from shardmesh.engine.at_once import computations, with_neighbours
from shardmesh.engine.base import Engine, Output
from shardmesh.errors import InputError, OurError, ShardmeshError
from shardmesh.links.link import Link
from shardmesh.listener.copies import Copy
from shardmesh.listener.handing import hand_on
from shardmesh.listener.kept_sequences import Place
from shardmesh.listener.stage_session import (
    StageCounters,
    StageIdentity,
    StageSession,
    Work,
    result_message,
    sampling_settings,
)
from shardmesh.wire.limits import ENGINE_CALL_TIMEOUT_S
from shardmesh.wire.messages import OpenSession, StageTiming

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PACE_WEIGHT = 0.1
"""Of a new token in the time that is told of one: some twenty tokens make a change known."""


class Sessions(Protocol):
    """What the thread asks and tells the stage; all of it may be called from any thread."""

    @property
    def n_sessions(self) -> int: ...

    def is_current(self, session: StageSession) -> bool:
        """Whether the session is still on this stage."""
        ...

    def fail_soon(self, session: StageSession, error: ShardmeshError) -> None:
        """The engine failed it: it is over."""
        ...

    def report_next_soon(self, session: StageSession, error: ShardmeshError, epoch: int) -> None:
        """The link to the next stage failed."""
        ...


class Computing:
    """What the worker's thread does; nothing of it may raise."""

    def __init__(
        self,
        engine: Engine,
        identity: StageIdentity,
        counters: StageCounters,
        sessions: Sessions,
    ) -> None:
        self._engine = engine
        self._identity = identity
        self._counters = counters
        self._sessions = sessions
        self._told: Work | None = None  # whose token is known already, and where it went
        self._handed_over: Link | None = None

    def job(self, session: StageSession | None, call: Callable[[], None]) -> Callable[[], None]:
        """A call into the engine as a job of the worker; a failure ends the session."""

        def run() -> None:
            error = self._guarded(call)
            if isinstance(error, ShardmeshError):
                logger.warning("engine: [%s] %s", error.code, error)
                if session is not None:
                    self._sessions.fail_soon(session, error)

        return run

    def together(self, waiting: Sequence[Work]) -> Sequence[int]:
        """Of the single tokens that wait, the indices of the first and of its neighbours."""
        if len(waiting) == 1:
            return (0,)
        sequences = [work.session.sequence for work in waiting]
        return with_neighbours(sequences, self._numbers_at_once())

    def compute(self, items: Sequence[Work]) -> None:
        """Computes micro-batches, as many at once as change no bit, and sends on what is ready."""
        # Who left must be gone before they are divided: how many are at once decides the bits.
        works = [work for work in items if self._is_wanted(work)]
        if len(works) <= 1:
            self._compute_part(works)
            return
        works.sort(key=lambda work: work.session.sequence)
        parts = computations([work.batch for work in works], self._numbers_at_once())
        for part in parts:
            computed, works = works[: len(part)], works[len(part) :]
            self._compute_part(computed)

    def _is_wanted(self, work: Work) -> bool:
        session, position = work.session, work.batch.position
        if not self._sessions.is_current(session):
            return False
        if self._engine.info.is_last:
            return session.checks.is_due(
                position,
                work.branch,
                work.check,
                n_computed=self._engine.n_held(session.sequence),
            )
        return not session.outgoing.is_void(work.branch, position)

    def _numbers_at_once(self) -> list[int]:
        """How many sequences to advance at once: not more than this stage's share of them.

        A stage that took all that waits would leave the others of the chain with nothing to do.
        """
        info = self._engine.info
        n_share = math.ceil(self._sessions.n_sessions * info.n_layer / info.n_layer_model)
        return [number for number in info.numbers_at_once if number <= n_share]

    def _compute_part(self, works: list[Work]) -> None:
        if not works:
            return
        started_s = time.monotonic()
        call = partial(self._engine.compute, [work.batch for work in works])
        if len(works) == 1 and self._engine.info.is_last:
            # How likely it was takes a tenth of a millisecond: the first stage begins before that.
            call = partial(call, tell_token=partial(self._on_token, works[0]))
        results = self._guarded(call)
        if isinstance(results, InputError) and len(works) > 1:  # nothing was computed yet
            for work in works:
                self._compute_part([work])
            return
        compute_us = int((time.monotonic() - started_s) * 1e6)
        held = _hold_links(works)
        try:
            for number, work in enumerate(works):
                result = results if isinstance(results, ShardmeshError) else results[number]
                self._deliver(work, result, started_s, compute_us)
        finally:
            for link in held:
                link.release()
            self._told = self._handed_over = None
        self._counters.compute_us += compute_us  # now that the results are on their way
        if works[0].batch.n_tokens == 1:
            self._note_pace(compute_us)

    def _on_token(self, work: Work, token: int) -> None:
        """The token behind a micro-batch is known: the first stage may begin with it."""
        session = work.session
        if self._sessions.is_current(session):
            session.checks.sampled(work.batch.position + work.batch.n_tokens, token)
            self._told, self._handed_over = work, hand_on(work, token)

    def _guarded(self, call: Callable[[], Result]) -> Result | ShardmeshError:
        """What a call into the engine gives, or the error that it ends the session with."""
        try:
            with self._engine.watchdog.within(ENGINE_CALL_TIMEOUT_S):
                return call()
        except ShardmeshError as error:
            return error
        except Exception as error:
            logger.exception("the engine raised something unexpected")
            return OurError(f"the engine failed: {type(error).__name__}")

    def _note_pace(self, compute_us: int) -> None:
        """Keeps the time of one token, which several sessions that go at once all take."""
        known_us = self._counters.token_us or compute_us
        self._counters.token_us = max(1, int(known_us + PACE_WEIGHT * (compute_us - known_us)))

    def _deliver(
        self, work: Work, result: Output | ShardmeshError, started_s: float, compute_us: int
    ) -> None:
        session = work.session
        if not self._sessions.is_current(session):
            return
        if isinstance(result, ShardmeshError):
            self._sessions.fail_soon(session, result)
            return
        if result.sampled is not None and self._told is not work:
            self._on_token(work, result.sampled.token)
        handed_over = self._handed_over if self._told is work else None
        queue_us = int((started_s - work.received_s) * 1e6)
        next_hop = handed_over or session.next_link or session.coordinator
        timing = StageTiming(
            layer_start=self._identity.layer_start,
            layer_end=self._identity.layer_end,
            queue_us=queue_us,
            compute_us=compute_us,
            next_hop_us=next_hop.half_round_trip_us,
        )
        is_handed = handed_over is not None
        message, body = result_message(work, result, (*work.timings, timing), is_handed=is_handed)
        epoch = session.epoch
        try:
            session.outgoing.add(message.position, work.batch.n_tokens, message, body)
        except ShardmeshError as error:
            self._sessions.report_next_soon(session, error, epoch)
        else:
            session.acknowledge()
        self._counters.n_batches += 1
        self._counters.n_tokens += work.batch.n_tokens
        self._counters.queue_us += queue_us


def _hold_links(works: Sequence[Work]) -> Collection[Link]:
    """Has what was computed together travel together, so that the next stage has it at once."""
    if len(works) == 1:
        return ()
    sessions = [work.session for work in works]
    links = {link for s in sessions for link in (s.next_link, s.first_link, s.coordinator) if link}
    for link in links:
        link.hold()
    return links


def begin_sequence(
    engine: Engine, message: OpenSession, place: Place, copy: Copy | None = None
) -> None:
    """Opens the sequence of a new session with what it begins behind; raises EngineError (ours).

    With a `copy` that is what the stage stood by with.
    """
    if copy is not None:
        engine.write_cells(place.sequence, copy.cells())
    elif place.copy_of is not None:
        engine.copy_sequence(place.copy_of, place.sequence)
    engine.open_sequence(
        place.sequence,
        sampling_settings(message),
        message.history,
        message.adapter,
        n_keep=place.n_held,
    )


def _outcome(output: Output) -> Output | ShardmeshError:
    """An output, or why there is none."""
    return output if output.failure is None else output.failure
