"""A stage at work: sessions from links in, micro-batches through the engine, results out.

Everything but the engine runs on the trio loop; the engine is called from one worker thread at a
time, and only from `compute_forever`.  A failure ends the session that it belongs to, never the
stage.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Literal, TypeVar

import trio

from shardmesh.engine.at_once import computations
from shardmesh.engine.base import Engine, MicroBatch, Output
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
    check_neighbours,
    check_request,
    failure_message,
    hop_failure_message,
    new_session,
    result_message,
    sampling_settings,
)
from shardmesh.listener.worker import Computes, Worker
from shardmesh.wire.messages import (
    BatchTaken,
    CloseSession,
    HiddenBatch,
    Message,
    NextStage,
    OpenSession,
    RepairSession,
    ResumeSession,
    SessionOpened,
    SessionRepaired,
    StageTiming,
    TokenBatch,
    TrimSession,
    body_to_hidden,
)

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Side = Literal["previous", "next"]

GetLink = Callable[[NextStage], Awaitable[Link]]
MakeWorker = Callable[[Callable[[list[Work]], None]], "Computes[Work]"]


PACE_WEIGHT = 0.1
"""Of a new token in the time that is told of one: some twenty tokens make a change known."""


class Stage:
    """The sessions of one loaded shard; the `LinkUser` of all links of a data process."""

    def __init__(
        self,
        engine: Engine,
        identity: StageIdentity,
        nursery: trio.Nursery,
        get_link: GetLink,
        make_worker: MakeWorker = Worker,
    ) -> None:
        self.counters = StageCounters()
        self._engine = engine
        self._identity = identity
        self._nursery = nursery
        self._get_link = get_link
        self._sessions: dict[bytes, StageSession] = {}
        self._free_sequences = list(range(engine.info.n_parallel))
        self._worker = make_worker(self._compute)
        self._trio_token = trio.lowlevel.current_trio_token()
        self.is_draining = False
        """No further session is taken; those that are here go on."""

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
            case RepairSession():
                self._repair(link, message)
            case ResumeSession():
                self._resume(link, message)
            case BatchTaken():
                self._on_taken(link, message)
            case CloseSession():
                session = self._sessions.get(message.session)
                if session is not None and session.coordinator is link:
                    self._release(session)
            case _:
                raise ProtocolError(f"a stage gets no {type(message).__name__}")

    def on_closed(self, link: Link, error: ShardmeshError) -> None:
        """Frees the sessions of a lost coordinator; tells of a lost next stage."""
        for session in list(self._sessions.values()):
            if session.coordinator is link:
                self._release(session)
            elif session.next_link is link:
                self._report_hop(session, "next", error)

    def on_suspected(self, link: Link) -> None:
        """Nothing: the coordinator hears the silence of a stage by itself."""

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
            if earlier.coordinator is not link or message.epoch <= earlier.epoch:
                raise ProtocolError("a session was opened twice in one epoch")
            self._release(earlier)
        info = self._engine.info
        try:
            if self.is_draining:
                raise UnreachableError("this node takes no new sessions", code="NODE_LEAVING")
            check_request(message, self._identity, info, len(self._free_sequences))
        except ShardmeshError as error:
            self.counters.n_sessions_refused += 1
            self._refuse(link, message.session, message.epoch, error)
            return
        session = new_session(message, self._free_sequences.pop(0), link, info)
        self._sessions[message.session] = session
        self.counters.n_sessions_opened += 1
        sampling = sampling_settings(message)
        self._run_in_engine(
            session,
            lambda: self._engine.open_sequence(
                session.sequence, sampling, message.history, message.adapter
            ),
        )
        opened = SessionOpened(session=message.session, epoch=message.epoch)
        self._start_connecting(session, lambda: opened)

    def _repair(self, link: Link, message: RepairSession) -> None:
        """Lets go of the old neighbours; what waits for the engine is computed all the same."""
        session = self._sessions.get(message.session)
        if session is None or session.coordinator is not link:
            self._refuse(link, message.session, message.epoch, _no_session())
            return
        if message.epoch <= session.epoch:
            self.counters.n_late_frames += 1
            return
        try:
            check_neighbours(message, self._engine.info)
        except ShardmeshError as error:
            self._fail(session, error)
            return
        self.counters.n_sessions_repaired += 1
        session.move_to(message.epoch, message.previous_stage, message.next_stage)
        self._start_connecting(session, lambda: _repaired(session))

    def _start_connecting(self, session: StageSession, answer: Callable[[], Message]) -> None:
        # Epoch and scope are those of now: the next repair may be read before the task begins.
        self._nursery.start_soon(self._connect, session, session.epoch, session.connecting, answer)

    async def _connect(
        self,
        session: StageSession,
        epoch: int,
        scope: trio.CancelScope,
        answer: Callable[[], Message],
    ) -> None:
        """Brings up the link to the next stage, then tells the coordinator."""
        link = session.coordinator
        try:
            with scope:  # a session that ends meanwhile leaves nothing waiting
                if session.next_stage is not None:
                    link = await self._get_link(session.next_stage)
        except ShardmeshError as error:
            self._report_hop(session, "next", error, epoch)
            return
        if not self._is_current(session) or session.epoch != epoch:
            return
        session.next_link = link
        self._tell(session, answer())

    def _resume(self, link: Link, message: ResumeSession) -> None:
        session = self._session_of(message.session, message.epoch)
        if session is None or session.coordinator is not link or session.next_link is None:
            return
        session.n_replay = message.n_replay
        try:
            session.outgoing.resume(
                session.next_link, send_from=message.send_from, n_replay=message.n_replay
            )
        except ProtocolError as error:
            self._fail(session, error)
        except ShardmeshError as error:
            self._report_hop(session, "next", error)
        else:
            self._acknowledge(session)

    def _on_taken(self, link: Link, message: BatchTaken) -> None:
        session = self._session_of(message.session, message.epoch)
        if session is None or session.next_link is not link:
            return
        try:
            session.outgoing.taken(message.n_taken)
        except ShardmeshError as error:
            self._report_hop(session, "next", error)
        else:
            self._acknowledge(session)

    def _trim(self, link: Link, message: TrimSession) -> None:
        session = self._session_of(message.session, message.epoch)
        if session is None or session.coordinator is not link:
            return
        if message.n_keep > session.n_received:
            self._fail(session, ProtocolError("a trim beyond what the session holds"))
            return
        self._worker.forget(message.session)
        session.n_received = message.n_keep
        session.outgoing.forget_from(message.n_keep)
        self._run_in_engine(
            session, lambda: self._engine.trim_sequence(session.sequence, message.n_keep)
        )

    def _release(self, session: StageSession) -> None:
        """Frees the session's sequence.

        The next session can have it at once: the engine's jobs keep their order, so it is emptied
        behind whatever is computed now and before whatever comes.
        """
        self._sessions.pop(session.session_id, None)
        session.outgoing.hold()
        session.connecting.cancel()
        self._worker.forget(session.session_id)
        self._run_in_engine(None, lambda: self._engine.close_sequence(session.sequence))
        self._free_sequences.append(session.sequence)

    def _fail(self, session: StageSession, error: ShardmeshError) -> None:
        if not self._is_current(session):
            return
        self.counters.n_sessions_failed += 1
        self._release(session)
        self._refuse(session.coordinator, session.session_id, session.epoch, error)

    def _refuse(self, link: Link, session_id: bytes, epoch: int, error: ShardmeshError) -> None:
        """Says that the session is not, or no longer, on this stage."""
        logger.info("session ended: [%s] %s", error.code, error)
        self._send_or_close(link, failure_message(session_id, epoch, self._identity, error))

    def _report_hop(
        self, session: StageSession, hop: Side, error: ShardmeshError, epoch: int | None = None
    ) -> None:
        """Says that a neighbour failed, unless it was that of an earlier epoch.

        The session waits for its repair.
        """
        if not self._is_current(session) or epoch not in (None, session.epoch):
            return
        if hop == "previous":
            if session.is_deaf:
                return
            session.is_deaf = True
        else:
            session.outgoing.hold()
            session.next_link = None
        logger.info("the %s hop of a session failed: [%s] %s", hop, error.code, error)
        self._tell(session, hop_failure_message(session, hop, error))

    def _tell(self, session: StageSession, message: Message) -> None:
        self._send_or_close(session.coordinator, message)

    def _send_or_close(self, link: Link, message: Message) -> None:
        try:
            link.send(message)
        except ShardmeshError as send_error:
            # Its coordinator is gone or does not read: closing tells it, if anything does.
            link.close(send_error)

    # -- micro-batches -------------------------------------------------------------------------

    def _session_of(self, session_id: bytes, epoch: int) -> StageSession | None:
        """The session a frame belongs to; None for one that is over or of another epoch."""
        session = self._sessions.get(session_id)
        if session is None or session.epoch != epoch:
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
        try:
            self._enqueue(session, link, batch, ())
        except ShardmeshError as error:
            self._fail(session, error)

    def _on_hidden(self, link: Link, message: HiddenBatch, body: memoryview) -> None:
        session = self._session_of(message.session, message.epoch)
        if session is None:
            return
        if link.peer_id != session.previous_stage:
            raise ProtocolError("hidden states came from where none are due")
        if session.is_deaf:
            return
        try:
            if message.n_embd != self._engine.info.n_embd:
                raise ProtocolError(f"hidden states of width {message.n_embd} do not fit")
            batch = MicroBatch(
                sequence=session.sequence,
                position=message.position,
                hidden=body_to_hidden(message, body),
                sample=message.sample,
                want_embedding=message.embed,
            )
            self._enqueue(session, link, batch, message.timings)
        except InputError as error:
            self._fail(session, error)
        except ShardmeshError as error:
            self._report_hop(session, "previous", error)

    def _enqueue(
        self, session: StageSession, link: Link, batch: MicroBatch, timings: tuple[StageTiming, ...]
    ) -> None:
        """Queues a micro-batch; raises ProtocolError for one that cannot be right, InputError."""
        if batch.position != session.n_received:
            raise ProtocolError(
                f"position {batch.position} came, {session.n_received} was due",
                code="OUT_OF_ORDER",
            )
        if batch.position + batch.n_tokens > session.opened_by.n_ctx:
            raise InputError("the session's context is full", code="CONTEXT_FULL")
        session.previous_link = link
        work = Work(session, batch, timings, time.monotonic())
        self._worker.add(session.session_id, batch.n_tokens, work)
        session.n_received += batch.n_tokens

    def _acknowledge(self, session: StageSession) -> None:
        """In a replay: lets the previous hop send more, once what came is dealt with."""
        if session.n_acknowledged >= session.n_replay:
            return
        n_taken, link = session.outgoing.n_done, session.previous_link
        if link is None or session.n_acknowledged >= n_taken:
            return
        session.n_acknowledged = n_taken
        taken = BatchTaken(session=session.session_id, epoch=session.epoch, n_taken=n_taken)
        with contextlib.suppress(ShardmeshError):  # its end is noticed by the link itself
            link.send(taken)

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
        # Who left must be gone before they are divided: how many are at once decides the bits.
        current = [work for work in works if self._is_current(work.session)]
        works = sorted(current, key=lambda work: work.session.sequence)
        parts = computations([work.batch for work in works], self._numbers_at_once())
        for part in parts:
            computed, works = works[: len(part)], works[len(part) :]
            self._compute_part(computed)

    def _numbers_at_once(self) -> list[int]:
        """How many sequences to advance at once: not more than this stage's share of them.

        A stage that took all that waits would leave the others of the chain with nothing to do.
        """
        info = self._engine.info
        n_share = math.ceil(len(self._sessions) * info.n_layer / info.n_layer_model)
        return [number for number in info.numbers_at_once if number <= n_share]

    def _compute_part(self, works: list[Work]) -> None:
        if not works:
            return
        started_s = time.monotonic()
        results = _guarded(partial(self._engine.compute, [work.batch for work in works]))
        if isinstance(results, InputError) and len(works) > 1:  # nothing was computed yet
            for work in works:
                self._compute_part([work])
            return
        compute_us = int((time.monotonic() - started_s) * 1e6)
        self.counters.compute_us += compute_us
        if works[0].batch.n_tokens == 1:
            self._note_pace(compute_us)
        for number, work in enumerate(works):
            result = results if isinstance(results, ShardmeshError) else results[number]
            self._deliver(work, result, started_s, compute_us)

    def _note_pace(self, compute_us: int) -> None:
        """Keeps the time of one token, which several sessions that go at once all take."""
        known_us = self.counters.token_us or compute_us
        self.counters.token_us = max(1, int(known_us + PACE_WEIGHT * (compute_us - known_us)))

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
        message, body = result_message(work, result, (*work.timings, timing))
        epoch = session.epoch
        try:
            session.outgoing.add(message.position, work.batch.n_tokens, message, body)
        except ShardmeshError as error:
            self._trio_token.run_sync_soon(self._report_hop, session, "next", error, epoch)
        else:
            self._acknowledge(session)

    def _is_current(self, session: StageSession) -> bool:
        return self._sessions.get(session.session_id) is session

    def _fail_from_worker(self, session: StageSession, error: ShardmeshError) -> None:
        self._trio_token.run_sync_soon(self._fail, session, error)


def _repaired(session: StageSession) -> SessionRepaired:
    return SessionRepaired(
        session=session.session_id,
        epoch=session.epoch,
        n_received=session.n_received,
        n_computed=session.outgoing.n_computed,
        kept_from=session.outgoing.kept_from,
        branch=0,
    )


def _no_session() -> UnreachableError:
    return UnreachableError("this stage does not hold the session", code="NO_SESSION")


def _guarded(call: Callable[[], Result]) -> Result | ShardmeshError:
    """What a call into the engine gives, or the error that it ends the session with."""
    try:
        return call()
    except ShardmeshError as error:
        return error
    except Exception as error:
        logger.exception("the engine raised something unexpected")
        return OurError(f"the engine failed: {type(error).__name__}")
