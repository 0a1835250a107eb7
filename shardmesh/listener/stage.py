"""A stage at work: sessions from links in, micro-batches through the engine, results out.

Everything but the engine runs on the trio loop; the engine is called from one worker thread at a
time (`listener/worker.py`).  A failure ends the session that it belongs to, never the stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from shardmesh.engine.base import Engine
from shardmesh.errors import ProtocolError, ShardmeshError, UnreachableError
from shardmesh.links.link import Link
from shardmesh.listener.computing import begin_sequence
from shardmesh.listener.copies import Copies
from shardmesh.listener.copying import Copier
from shardmesh.listener.handing import give_up
from shardmesh.listener.intake import Intake
from shardmesh.listener.sessions import HeldSessions, MakeWorker, send_or_close
from shardmesh.listener.stage_session import (
    StageCounters,
    StageIdentity,
    StageSession,
    check_neighbours,
    check_request,
    check_shard,
    check_share,
    new_session,
)
from shardmesh.listener.worker import Worker
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

GetLink = Callable[[NextStage], Awaitable[Link]]


def _leaving(session: StageSession) -> UnreachableError:
    return UnreachableError(
        "the node that serves these layers is shutting down", code="NODE_LEAVING"
    )


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
        self.sessions = HeldSessions(engine, identity, make_worker)
        self._engine = engine
        self._identity = identity
        self._nursery = nursery
        self._get_link = get_link
        self._copies = Copies(engine.info)
        in_engine = partial(self.sessions.run_in_engine, None)
        self._copier = Copier(engine, in_engine, nursery, get_link)
        self._intake = Intake(engine, self.sessions, self._copier)
        self.is_draining = False
        """No further session is taken; those that are here go on."""
        self.sessions_per_node_max = SESSIONS_PER_NODE_MAX

    @property
    def counters(self) -> StageCounters:
        return self.sessions.counters

    @property
    def n_sessions(self) -> int:
        return len(self.sessions)

    @property
    def sequences_in_use(self) -> list[int]:
        """Those of sessions; what others keep may go at any moment."""
        return [session.sequence for session in self.sessions]

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
        await self.sessions.worker.run()

    # -- links ---------------------------------------------------------------------------------

    def on_message(self, link: Link, message: Message, body: memoryview) -> None:
        """One message of a link; raises ProtocolError for one that stages do not get."""
        match message:
            case OpenSession():
                self._open(link, message)
            case TokenBatch():
                self._intake.on_tokens(link, message)
            case HiddenBatch():
                self._intake.on_hidden(link, message, body)
            case TrimSession():
                self._trim(link, message)
            case RepairSession():
                self._repair(link, message)
            case ResumeSession():
                self._resume(link, message)
            case BatchTaken():
                self._on_taken(link, message)
            case CloseSession():
                session = self.sessions.get(message.session)
                if session is not None and session.coordinator is link:
                    self.sessions.release(session)
                self._copies.drop(message.session, link)
            case StandBy():
                self._stand_by(link, message)
            case KvCopy():
                n_taken = self._copies.add(link.peer_id, message, body)
                if n_taken is not None:
                    send_or_close(link, KvTaken(session=message.session, n_taken=n_taken))
            case CopyTo() | KvTaken():
                self._copy(link, message)
            case _:
                raise ProtocolError(f"a stage gets no {type(message).__name__}")

    def on_closed(self, link: Link, error: ShardmeshError) -> None:
        """Frees the sessions of a lost coordinator; tells of a lost next stage."""
        self._copies.drop_all_of(link)
        for session in self.sessions:
            if session.coordinator is link:
                self.sessions.release(session)
            elif session.next_link is link:
                self.sessions.report_hop(session, "next", error)
            elif session.first_link is link:
                give_up(session, error)
            self._copier.lost(session, link)
        self.sessions.worker.wake()  # a message that ended the link may have come with good ones

    def on_all_read(self, link: Link) -> None:
        """Lets the worker begin: what came together may be computed together."""
        self.sessions.worker.wake()

    def on_suspected(self, link: Link) -> None:
        """Nothing: the coordinator hears the silence of a stage by itself."""

    async def farewell(self, why: Callable[[StageSession], ShardmeshError] = _leaving) -> None:
        """Ends all sessions with an error that says so, and waits until it is sent."""
        links = {session.coordinator for session in self.sessions}
        for session in self.sessions:
            self.sessions.fail(session, why(session))
        for link in links:
            await link.flush()

    # -- sessions ------------------------------------------------------------------------------

    def _open(self, link: Link, message: OpenSession) -> None:
        earlier = self.sessions.get(message.session)
        if earlier is not None:
            # Its coordinator may have a new link, since the one before has fallen silent.
            is_others = earlier.coordinator.peer_id != link.peer_id
            if is_others or message.epoch <= earlier.epoch:
                raise ProtocolError("a session was opened twice in one epoch")
            self.sessions.release(earlier)
        info = self._engine.info
        try:
            if self.is_draining:
                raise UnreachableError("this node takes no new sessions", code="NODE_LEAVING")
            check_request(message, self._identity, info, self.sessions.sequences.n_free)
            check_share(self.sessions.n_of_node(link.peer_id), self.sessions_per_node_max)
        except ShardmeshError as error:
            self.counters.n_sessions_refused += 1
            self.sessions.refuse(link, message.session, message.epoch, error)
            return
        running = ((s.sequence, s.held_prefix) for s in self.sessions)
        place = self.sessions.sequences.take(message.prefix, running if message.prefix else ())
        copy = self._copies.find(message.session, link) if message.take_over else None
        if copy is not None:
            place = dataclasses.replace(place, n_held=copy.n_held)
            self.counters.n_copies_used += 1
        session = new_session(message, place, link, info)
        self.sessions.add(session)
        self.counters.n_tokens_reused += 0 if copy is not None else place.n_held
        begin = partial(begin_sequence, self._engine, message, place, copy)
        self.sessions.run_in_engine(session, begin)
        opened = SessionOpened(session=message.session, epoch=message.epoch, n_held=place.n_held)
        self._start_connecting(session, lambda: opened)

    def _repair(self, link: Link, message: RepairSession) -> None:
        """Lets go of the old neighbours; what waits for the engine is computed all the same."""
        session = self.sessions.get(message.session)
        if session is None or session.coordinator is not link:
            self.sessions.refuse(link, message.session, message.epoch, _no_session())
            return
        if message.epoch <= session.epoch:
            self.counters.n_late_frames += 1
            return
        try:
            check_neighbours(message, self._engine.info)
        except ShardmeshError as error:
            self.sessions.fail(session, error)
            return
        self.counters.n_sessions_repaired += 1
        session.move_to(message)
        missed = next((each for each in message.branches if each[0] > session.branch), None)
        if missed is not None and missed[1] < session.n_received:
            self._intake.begin_branch(session, *missed)
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
                if not self.sessions.is_in(session, epoch):
                    return
                session.next_link = link
                send_or_close(session.coordinator, answer())
                if session.first_stage is not None:
                    await self._connect_first(session, session.first_stage, epoch)
        except ShardmeshError as error:
            self.sessions.report_hop(session, "next", error, epoch)

    async def _connect_first(self, session: StageSession, first: NextStage, epoch: int) -> None:
        try:
            link = await self._get_link(first)
        except ShardmeshError as error:
            if self.sessions.is_in(session, epoch):
                give_up(session, error)
            return
        if self.sessions.is_in(session, epoch):
            session.first_link = link

    def _resume(self, link: Link, message: ResumeSession) -> None:
        session = self.sessions.of_frame(message.session, message.epoch)
        if session is None or session.coordinator is not link or session.next_link is None:
            return
        session.n_replay = message.n_replay
        try:
            session.outgoing.resume(
                session.next_link, send_from=message.send_from, n_replay=message.n_replay
            )
        except ProtocolError as error:
            self.sessions.fail(session, error)
        except ShardmeshError as error:
            self.sessions.report_hop(session, "next", error)
        else:
            session.acknowledge()
        self._copies.drop(message.session, link)  # nobody will begin behind it again

    def _on_taken(self, link: Link, message: BatchTaken) -> None:
        session = self.sessions.of_frame(message.session, message.epoch)
        if session is None or session.next_link is not link:
            return
        try:
            session.outgoing.taken(message.n_taken)
        except ShardmeshError as error:
            self.sessions.report_hop(session, "next", error)
        else:
            session.acknowledge()

    def _trim(self, link: Link, message: TrimSession) -> None:
        session = self.sessions.of_frame(message.session, message.epoch)
        if session is None or session.coordinator is not link:
            return
        if message.n_keep > session.n_received:
            self.sessions.fail(session, ProtocolError("a trim beyond what the session holds"))
            return
        self.sessions.worker.forget(message.session)
        session.n_received = message.n_keep
        session.outgoing.forget_from(message.n_keep)
        session.handed.forget_from(message.n_keep)
        self.sessions.run_in_engine(
            session, lambda: self._engine.trim_sequence(session.sequence, message.n_keep)
        )
        send_or_close(session.coordinator, _repaired(session))

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
            self.sessions.refuse(link, message.session, 0, error)
        else:
            send_or_close(link, StandingBy(session=message.session))

    def _copy(self, link: Link, message: CopyTo | KvTaken) -> None:
        session = self.sessions.get(message.session)
        if session is None:
            return
        if isinstance(message, KvTaken):
            self._copier.taken(session, link, message)
        elif session.coordinator is link:
            self._copier.begin(session, message)


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
