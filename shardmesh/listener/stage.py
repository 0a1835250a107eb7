"""A stage at work: sessions from links in, micro-batches through the engine, results out.

Everything but the engine runs on the trio loop; the engine is called from one worker thread at a
time, and only from `compute_forever`.  A failure ends the session that it belongs to, never the
stage.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Literal

import trio

from shardmesh.engine.base import Engine, MicroBatch
from shardmesh.errors import (
    InputError,
    ProtocolError,
    ShardmeshError,
    UnreachableError,
)
from shardmesh.links.link import Link
from shardmesh.listener.computing import Computing, begin_sequence
from shardmesh.listener.copies import Copies
from shardmesh.listener.copying import Copier
from shardmesh.listener.handing import give_up
from shardmesh.listener.kept_sequences import KeptSequences
from shardmesh.listener.stage_session import (
    StageCounters,
    StageIdentity,
    StageSession,
    Work,
    check_neighbours,
    check_request,
    check_shard,
    check_share,
    failure_message,
    hidden_of,
    hop_failure_message,
    new_session,
)
from shardmesh.listener.worker import Computes, Worker
from shardmesh.wire.limits import COPIES_BYTES_MAX, SESSIONS_PER_NODE_MAX
from shardmesh.wire.messages import (
    BatchTaken,
    CloseSession,
    CopyTo,
    HiddenBatch,
    KvCopy,
    KvTaken,
    Message,
    NextStage,
    OpenSession,
    RepairSession,
    ResumeSession,
    SessionOpened,
    SessionRepaired,
    StandBy,
    StandingBy,
    TokenBatch,
    TrimSession,
)

logger = logging.getLogger(__name__)

Side = Literal["previous", "next"]

GetLink = Callable[[NextStage], Awaitable[Link]]
MakeWorker = Callable[[Callable[[list[Work]], None]], "Computes[Work]"]


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
        self._sequences = KeptSequences(engine.info.n_parallel, engine.info.n_ctx)
        self._computing = Computing(engine, identity, self.counters, self)
        self._worker = make_worker(self._computing.compute)
        self._copies = Copies(engine.info)
        self._copier = Copier(engine, partial(self._run_in_engine, None), nursery, get_link)
        self._trio_token = trio.lowlevel.current_trio_token()
        self.is_draining = False
        """No further session is taken; those that are here go on."""
        self.sessions_per_node_max = SESSIONS_PER_NODE_MAX

    @property
    def n_sessions(self) -> int:
        return len(self._sessions)

    @property
    def sequences_in_use(self) -> list[int]:
        """Those of sessions; what others keep may go at any moment."""
        return [session.sequence for session in self._sessions.values()]

    def limit_copies(self, n_bytes: int) -> None:
        """Takes no more memory than that as a standby."""
        self._copies.n_bytes_max = min(n_bytes, COPIES_BYTES_MAX)

    @property
    def copy_figures(self) -> dict[str, int]:
        """What it keeps as a standby now, and what it has sent to standbys."""
        return {
            "n_copies": len(self._copies),
            "copy_bytes": self._copies.n_bytes,
            "copy_bytes_sent": self._copier.n_bytes_sent,
        }

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
                self._copies.drop(message.session, link)
            case StandBy():
                self._stand_by(link, message)
            case KvCopy():
                n_taken = self._copies.add(link.peer_id, message, body)
                if n_taken is not None:
                    self._send_or_close(link, KvTaken(session=message.session, n_taken=n_taken))
            case CopyTo() | KvTaken():
                self._copy(link, message)
            case _:
                raise ProtocolError(f"a stage gets no {type(message).__name__}")

    def on_closed(self, link: Link, error: ShardmeshError) -> None:
        """Frees the sessions of a lost coordinator; tells of a lost next stage."""
        self._copies.drop_all_of(link)
        for session in list(self._sessions.values()):
            if session.coordinator is link:
                self._release(session)
            elif session.next_link is link:
                self._report_hop(session, "next", error)
            elif session.first_link is link:
                give_up(session, error)
            self._copier.lost(session, link)

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
            check_request(message, self._identity, info, self._sequences.n_free)
            check_share(self._n_sessions_of(link.peer_id), self.sessions_per_node_max)
        except ShardmeshError as error:
            self.counters.n_sessions_refused += 1
            self._refuse(link, message.session, message.epoch, error)
            return
        running = ((s.sequence, s.held_prefix) for s in self._sessions.values())
        place = self._sequences.take(message.prefix, running if message.prefix else ())
        copy = self._copies.find(message.session, link) if message.take_over else None
        if copy is not None:
            place = dataclasses.replace(place, n_held=copy.n_held)
            self.counters.n_copies_used += 1
        session = new_session(message, place, link, info)
        self._sessions[message.session] = session
        self.counters.n_sessions_opened += 1
        self.counters.n_tokens_reused += 0 if copy is not None else place.n_held
        self.counters.n_sequences_kept = self._sequences.n_kept
        begin = partial(begin_sequence, self._engine, message, place, copy)
        self._run_in_engine(session, begin)
        opened = SessionOpened(session=message.session, epoch=message.epoch, n_held=place.n_held)
        self._start_connecting(session, lambda: opened)

    def _n_sessions_of(self, peer_id: str) -> int:
        return sum(s.coordinator.peer_id == peer_id for s in self._sessions.values())

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
        session.move_to(message)
        missed = next((each for each in message.branches if each[0] > session.branch), None)
        if missed is not None and missed[1] < session.n_received:
            self._begin_branch(session, *missed)
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
        """Brings up the link to the next stage, then tells the coordinator.

        The last stage tells at once, and brings up its link to the first.
        """
        try:
            with scope:  # a session that ends meanwhile leaves nothing waiting
                link = session.coordinator
                if session.next_stage is not None:
                    link = await self._get_link(session.next_stage)
                if not self._is_in(session, epoch):
                    return
                session.next_link = link
                self._tell(session, answer())
                if session.first_stage is not None:
                    await self._connect_first(session, session.first_stage, epoch)
        except ShardmeshError as error:
            self._report_hop(session, "next", error, epoch)

    async def _connect_first(self, session: StageSession, first: NextStage, epoch: int) -> None:
        try:
            link = await self._get_link(first)
        except ShardmeshError as error:
            if self._is_in(session, epoch):
                give_up(session, error)
            return
        if self._is_in(session, epoch):
            session.first_link = link

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
            session.acknowledge()
        self._copies.drop(message.session, link)  # nobody will begin behind it again

    def _on_taken(self, link: Link, message: BatchTaken) -> None:
        session = self._session_of(message.session, message.epoch)
        if session is None or session.next_link is not link:
            return
        try:
            session.outgoing.taken(message.n_taken)
        except ShardmeshError as error:
            self._report_hop(session, "next", error)
        else:
            session.acknowledge()

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
        session.handed.forget_from(message.n_keep)
        self._run_in_engine(
            session, lambda: self._engine.trim_sequence(session.sequence, message.n_keep)
        )
        self._tell(session, _repaired(session))

    def _release(self, session: StageSession, *, is_well: bool = True) -> None:
        """Frees the session's sequence, which keeps the prompt that was computed if all is well.

        The next session can have it at once: the engine's jobs keep their order, so it is emptied
        behind whatever is computed now and before whatever comes.
        """
        self._sessions.pop(session.session_id, None)
        session.outgoing.hold()
        session.connecting.cancel()
        session.copy = None
        self._worker.forget(session.session_id)
        held = session.held_prefix if is_well else ()
        n_keep = held[-1].end if held else 0
        self._run_in_engine(None, lambda: self._engine.close_sequence(session.sequence, n_keep))
        self._sequences.give_back(session.sequence, held)
        self.counters.n_sequences_kept = self._sequences.n_kept

    def _fail(self, session: StageSession, error: ShardmeshError) -> None:
        if not self.is_current(session):
            return
        self.counters.n_sessions_failed += 1
        self._release(session, is_well=False)
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
        if not self.is_current(session) or epoch not in (None, session.epoch):
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

    # -- standbys ------------------------------------------------------------------------------

    def _stand_by(self, link: Link, message: StandBy) -> None:
        """Takes a copy of another replica's session, or says why not."""
        try:
            if self.is_draining:
                raise UnreachableError("this node takes no new sessions", code="NODE_LEAVING")
            check_shard(message, self._identity)
            check_share(self._copies.n_of_node(link.peer_id), self.sessions_per_node_max)
            self._copies.begin(link, message)
        except ProtocolError:
            raise
        except ShardmeshError as error:
            self._refuse(link, message.session, 0, error)
        else:
            self._send_or_close(link, StandingBy(session=message.session))

    def _copy(self, link: Link, message: CopyTo | KvTaken) -> None:
        session = self._sessions.get(message.session)
        if session is None:
            return
        if isinstance(message, KvTaken):
            self._copier.taken(session, link, message)
        elif session.coordinator is link:
            self._copier.begin(session, message)

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
        is_handed = link is not session.coordinator
        if not self._engine.info.is_first or (is_handed and link.peer_id != session.last_stage):
            raise ProtocolError("token ids came from where none are due")
        batch = MicroBatch(
            sequence=session.sequence,
            position=message.position,
            tokens=message.tokens,
            sample=message.sample,
            want_embedding=message.embed,
            scored=message.scored,
        )
        try:
            if is_handed:
                if not session.takes_handed(message):
                    return
                self.counters.n_tokens_handed += 1
            elif session.handed.is_copy(message, branch=session.branch):
                return
            self._enqueue(session, session.coordinator, batch, message)
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
                hidden=hidden_of(session, message, body),
                sample=message.sample,
                want_embedding=message.embed,
                scored=message.scored,
            )
            self._enqueue(session, link, batch, message)
        except InputError as error:
            self._fail(session, error)
        except ShardmeshError as error:
            self._report_hop(session, "previous", error)

    def _enqueue(
        self,
        session: StageSession,
        link: Link,
        batch: MicroBatch,
        message: TokenBatch | HiddenBatch,
    ) -> None:
        """Queues a micro-batch; raises ProtocolError for one that cannot be right, InputError."""
        if message.branch > session.branch and batch.position <= session.n_received:
            self._begin_branch(session, message.branch, batch.position)
        if batch.position != session.n_received:
            raise ProtocolError(
                f"position {batch.position} came, {session.n_received} was due",
                code="OUT_OF_ORDER",
            )
        if batch.position + batch.n_tokens > session.opened_by.n_ctx:
            raise InputError("the session's context is full", code="CONTEXT_FULL")
        session.previous_link = link
        timings = message.timings if isinstance(message, HiddenBatch) else ()
        work = Work(
            session,
            batch,
            message.branch,
            message.check,
            message.hand,
            timings,
            received_s=time.monotonic(),
        )
        self._worker.add(session.session_id, batch.n_tokens, work)
        session.n_received += batch.n_tokens
        if batch.sample and session.next_stage is None and session.first_sampled is None:
            session.first_sampled = batch.position
        self._copier.consider(session)

    def _begin_branch(self, session: StageSession, branch: int, position: int) -> None:
        """Drops what older branches put at this position and behind."""
        session.branch = branch
        if position == session.n_received:
            return
        session.n_received = position
        session.handed.forget_from(position)
        self._worker.forget(session.session_id, lambda work: work.batch.position >= position)
        if self._engine.info.is_last:
            return  # it computed nothing that was wrong
        session.outgoing.begin_branch(branch, position)
        self._run_in_engine(session, lambda: self._engine.trim_sequence(session.sequence, position))

    def _is_in(self, session: StageSession, epoch: int) -> bool:
        return self.is_current(session) and session.epoch == epoch

    # -- from the worker's thread ----------------------------------------------------------------

    def is_current(self, session: StageSession) -> bool:
        """See `computing.Sessions`."""
        return self._sessions.get(session.session_id) is session

    def fail_soon(self, session: StageSession, error: ShardmeshError) -> None:
        """See `computing.Sessions`."""
        self._trio_token.run_sync_soon(self._fail, session, error)

    def report_next_soon(self, session: StageSession, error: ShardmeshError, epoch: int) -> None:
        """See `computing.Sessions`."""
        self._trio_token.run_sync_soon(self._report_hop, session, "next", error, epoch)

    def _run_in_engine(self, session: StageSession | None, call: Callable[[], None]) -> None:
        """Has the worker make a call before its next batch; a failure ends the session."""
        self._worker.do(self._computing.job(session, call))


def _repaired(session: StageSession) -> SessionRepaired:
    return SessionRepaired(
        session=session.session_id,
        epoch=session.epoch,
        n_received=session.n_received,
        n_computed=session.outgoing.n_computed,
        kept_from=session.outgoing.kept_from,
    )


def _no_session() -> UnreachableError:
    return UnreachableError("this stage does not hold the session", code="NO_SESSION")
