"""A stage at work: sessions from links in, micro-batches through the engine, results out.

Everything but the engine runs on the trio loop; the engine is called from one worker thread at a
time, and only from `compute_forever`.  A failure ends the session that it belongs to, never the
stage.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import trio

from shardmesh.engine.at_once import computations
from shardmesh.engine.base import Engine, Hidden, MicroBatch, Output
from shardmesh.errors import (
    InputError,
    OurError,
    ProtocolError,
    ShardmeshError,
    UnreachableError,
)
from shardmesh.links.link import Link
from shardmesh.listener.stage_session import (
    StageCounters,
    StageIdentity,
    StageSession,
    Work,
    check_request,
    failure_message,
    result_message,
    sampling_settings,
)
from shardmesh.listener.worker import Worker
from shardmesh.wire.messages import (
    CloseSession,
    HiddenBatch,
    Message,
    NextStage,
    OpenSession,
    SessionOpened,
    StageTiming,
    TokenBatch,
    TrimSession,
    body_to_hidden,
)

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

GetLink = Callable[[NextStage], Awaitable[Link]]


class Stage:
    """The sessions of one loaded shard; the `LinkUser` of all links of a data process."""

    def __init__(
        self, engine: Engine, identity: StageIdentity, nursery: trio.Nursery, get_link: GetLink
    ) -> None:
        self.counters = StageCounters()
        self._engine = engine
        self._identity = identity
        self._nursery = nursery
        self._get_link = get_link
        self._sessions: dict[bytes, StageSession] = {}
        self._free_sequences = list(range(engine.info.n_parallel))
        self._worker: Worker[Work] = Worker(self._compute)
        self._trio_token = trio.lowlevel.current_trio_token()

    @property
    def n_sessions(self) -> int:
        return len(self._sessions)

    async def run(self) -> None:
        """Computes until cancelled; the pass under way is waited for."""
        await self._worker.run()

    # -- links ---------------------------------------------------------------------------------

    def on_message(self, link: Link, message: Message, body: memoryview) -> None:
        """One message of a link; raises ProtocolError for one that stages do not get."""
        match message:
            case OpenSession():
                self._open(link, message)
            case TokenBatch():
                self._on_tokens(link, message)
            case HiddenBatch():
                self._on_hidden(link, message, body)
            case TrimSession():
                self._trim(link, message)
            case CloseSession():
                session = self._sessions.get(message.session)
                if session is not None and session.coordinator is link:
                    self._release(session)
            case _:
                raise ProtocolError(f"a stage gets no {type(message).__name__}")

    def on_closed(self, link: Link, error: ShardmeshError) -> None:
        """Frees the sessions of a lost coordinator, fails those that sent through the link."""
        for session in list(self._sessions.values()):
            if session.coordinator is link:
                self._release(session)
            elif session.next_link is link:
                self._fail(session, error)

    async def farewell(self) -> None:
        """Ends all sessions with an error that says so, and waits until it is sent."""
        leaving = UnreachableError(
            "the node that serves these layers is shutting down", code="NODE_LEAVING"
        )
        links = {session.coordinator for session in self._sessions.values()}
        for session in list(self._sessions.values()):
            self._fail(session, leaving)
        for link in links:
            await link.flush()

    # -- sessions ------------------------------------------------------------------------------

    def _open(self, link: Link, message: OpenSession) -> None:
        earlier = self._sessions.get(message.session)
        if earlier is not None:
            if earlier.coordinator is not link or message.epoch <= earlier.opened_by.epoch:
                raise ProtocolError("a session was opened twice in one epoch")
            self._release(earlier)
        try:
            check_request(message, self._identity, self._engine.info, len(self._free_sequences))
        except ShardmeshError as error:
            self.counters.n_sessions_refused += 1
            self._report(link, message, error)
            return
        session = StageSession(message, self._free_sequences.pop(0), link)
        self._sessions[message.session] = session
        self.counters.n_sessions_opened += 1
        sampling = sampling_settings(message)
        self._run_in_engine(
            session,
            lambda: self._engine.open_sequence(session.sequence, sampling, message.history),
        )
        self._nursery.start_soon(self._connect, session)

    async def _connect(self, session: StageSession) -> None:
        """Brings up the link to the next stage, then tells the coordinator."""
        message = session.opened_by
        try:
            if message.next_stage is not None:
                with session.connecting:  # a session that ends meanwhile leaves nothing waiting
                    session.next_link = await self._get_link(message.next_stage)
        except ShardmeshError as error:
            self._fail(session, error)
            return
        if self._is_current(session):
            opened = SessionOpened(session=message.session, epoch=message.epoch)
            try:
                session.coordinator.send(opened)
            except ShardmeshError as error:
                self._fail(session, error)

    def _trim(self, link: Link, message: TrimSession) -> None:
        session = self._session_of(message.session, message.epoch)
        if session is None or session.coordinator is not link:
            return
        if message.n_keep > session.n_received:
            self._fail(session, ProtocolError("a trim beyond what the session holds"))
            return
        self._worker.forget(message.session)
        session.n_received = message.n_keep
        self._run_in_engine(
            session, lambda: self._engine.trim_sequence(session.sequence, message.n_keep)
        )

    def _release(self, session: StageSession) -> None:
        """Frees the session's sequence.

        The next session can have it at once: the engine's jobs keep their order, so it is emptied
        behind whatever is computed now and before whatever comes.
        """
        self._sessions.pop(session.opened_by.session, None)
        session.connecting.cancel()
        self._worker.forget(session.opened_by.session)
        self._run_in_engine(None, lambda: self._engine.close_sequence(session.sequence))
        self._free_sequences.append(session.sequence)

    def _fail(self, session: StageSession, error: ShardmeshError) -> None:
        if not self._is_current(session):
            return
        self.counters.n_sessions_failed += 1
        self._release(session)
        self._report(session.coordinator, session.opened_by, error)

    def _report(self, link: Link, opened_by: OpenSession, error: ShardmeshError) -> None:
        logger.info("session ended: [%s] %s", error.code, error)
        failed = failure_message(opened_by, error)
        try:
            link.send(failed)
        except ShardmeshError as send_error:
            # Its coordinator is gone or does not read: closing tells it, if anything does.
            link.close(send_error)

    # -- micro-batches -------------------------------------------------------------------------

    def _session_of(self, session_id: bytes, epoch: int) -> StageSession | None:
        """The session a frame belongs to; None for one that is over or of another epoch."""
        session = self._sessions.get(session_id)
        if session is None or session.opened_by.epoch != epoch:
            self.counters.n_late_frames += 1
            return None
        return session

    def _on_tokens(self, link: Link, message: TokenBatch) -> None:
        session = self._session_of(message.session, message.epoch)
        if session is None:
            return
        if link is not session.coordinator or not self._engine.info.is_first:
            raise ProtocolError("token ids came from where none are due")
        batch = MicroBatch(
            sequence=session.sequence,
            position=message.position,
            tokens=message.tokens,
            sample=message.sample,
            want_embedding=message.embed,
        )
        self._enqueue(session, batch, ())

    def _on_hidden(self, link: Link, message: HiddenBatch, body: memoryview) -> None:
        session = self._session_of(message.session, message.epoch)
        if session is None:
            return
        if link.peer_id != session.opened_by.previous_stage:
            raise ProtocolError("hidden states came from where none are due")
        if message.n_embd != self._engine.info.n_embd:
            raise ProtocolError(f"hidden states of width {message.n_embd} do not fit this model")
        try:
            hidden: Hidden = body_to_hidden(message, body)
        except ProtocolError as error:
            self._fail(session, error)
            return
        batch = MicroBatch(
            sequence=session.sequence,
            position=message.position,
            hidden=hidden,
            sample=message.sample,
            want_embedding=message.embed,
        )
        self._enqueue(session, batch, message.timings)

    def _enqueue(
        self, session: StageSession, batch: MicroBatch, timings: tuple[StageTiming, ...]
    ) -> None:
        try:
            if batch.position != session.n_received:
                raise ProtocolError(
                    f"position {batch.position} came, {session.n_received} was due",
                    code="OUT_OF_ORDER",
                )
            if batch.position + batch.n_tokens > session.opened_by.n_ctx:
                raise InputError("the session's context is full", code="CONTEXT_FULL")
            work = Work(session, batch, timings, time.monotonic())
            self._worker.add(session.opened_by.session, batch.n_tokens, work)
        except ShardmeshError as error:
            self._fail(session, error)
            return
        session.n_received += batch.n_tokens

    # -- in the worker's thread -----------------------------------------------------------------

    def _run_in_engine(self, session: StageSession | None, job: Callable[[], None]) -> None:
        """Has the worker do a job before its next batch; a failure ends the session."""

        def run() -> None:
            error = _guarded(job)
            if isinstance(error, ShardmeshError):
                logger.warning("engine: [%s] %s", error.code, error)
                if session is not None:
                    self._fail_from_worker(session, error)

        self._worker.do(run)

    def _compute(self, works: list[Work]) -> None:
        """Computes micro-batches, some of them at once, and sends on what is ready."""
        works = sorted(works, key=lambda work: work.session.sequence)
        parts = computations([work.batch for work in works], self._numbers_at_once())
        for part in parts:
            computed, works = works[: len(part)], works[len(part) :]
            self._compute_part([work for work in computed if self._is_current(work.session)])

    def _numbers_at_once(self) -> list[int]:
        """How many sequences to advance at once: not more than this stage's share of them.

        A stage that took all that waits would leave the others of the chain with nothing to do.
        """
        info = self._engine.info
        n_share = math.ceil(len(self._sessions) * info.n_layer / info.n_layer_model)
        return [number for number in info.numbers_at_once if number <= n_share]

    def _compute_part(self, works: list[Work]) -> None:
        started_s = time.monotonic()
        results = _guarded(partial(self._engine.compute, [work.batch for work in works]))
        if isinstance(results, InputError) and len(works) > 1:  # nothing was computed yet
            for work in works:
                self._compute_part([work])
            return
        compute_us = int((time.monotonic() - started_s) * 1e6)
        self.counters.compute_us += compute_us
        for number, work in enumerate(works):
            result = results if isinstance(results, ShardmeshError) else results[number]
            self._deliver(work, result, started_s, compute_us)

    def _deliver(
        self, work: Work, result: Output | ShardmeshError, started_s: float, compute_us: int
    ) -> None:
        session = work.session
        if not self._is_current(session):
            return
        if isinstance(result, ShardmeshError):
            self._fail_from_worker(session, result)
            return
        queue_us = int((started_s - work.received_s) * 1e6)
        next_hop = session.next_link or session.coordinator
        timing = StageTiming(
            layer_start=self._identity.layer_start,
            layer_end=self._identity.layer_end,
            queue_us=queue_us,
            compute_us=compute_us,
            next_hop_us=next_hop.half_round_trip_us,
        )
        self.counters.n_batches += 1
        self.counters.n_tokens += work.batch.n_tokens
        self.counters.queue_us += queue_us
        try:
            next_hop.send(*result_message(work, result, (*work.timings, timing)))
        except ShardmeshError as error:
            self._fail_from_worker(session, error)

    def _is_current(self, session: StageSession) -> bool:
        return self._sessions.get(session.opened_by.session) is session

    def _fail_from_worker(self, session: StageSession, error: ShardmeshError) -> None:
        self._trio_token.run_sync_soon(self._fail, session, error)


def _guarded(call: Callable[[], Result]) -> Result | ShardmeshError:
    """What a call into the engine gives, or the error that it ends the session with."""
    try:
        return call()
    except ShardmeshError as error:
        return error
    except Exception as error:
        logger.exception("the engine raised something unexpected")
        return OurError(f"the engine failed: {type(error).__name__}")
