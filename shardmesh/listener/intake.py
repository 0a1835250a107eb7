"""Micro-batches that come to a stage, from the coordinator or the stage before: checked, queued."""

from __future__ import annotations

import time

from shardmesh.engine.base import Engine, MicroBatch
from shardmesh.errors import InputError, ProtocolError, ShardmeshError
from shardmesh.links.link import Link
from shardmesh.listener.copying import Copier
from shardmesh.listener.sessions import HeldSessions
from shardmesh.listener.stage_session import StageSession, Work, hidden_of
from shardmesh.wire.messages import HiddenBatch, TokenBatch


class Intake:
    """What a stage does with token ids and hidden states; on the trio loop."""

    def __init__(self, engine: Engine, sessions: HeldSessions, copier: Copier) -> None:
        self._engine = engine
        self._sessions = sessions
        self._copier = copier

    def on_tokens(self, link: Link, message: TokenBatch) -> None:
        """Token ids; raises ProtocolError (theirs) if they come from where none are due."""
        session = self._sessions.of_frame(message.session, message.epoch)
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
                if not session.takes_handed(message, self._engine.info.n_vocab):
                    return
                self._sessions.counters.n_tokens_handed += 1
            elif session.handed.is_copy(message, branch=session.branch):
                return
            self._enqueue(session, session.coordinator, batch, message)
        except ShardmeshError as error:
            self._sessions.fail(session, error)

    def on_hidden(self, link: Link, message: HiddenBatch, body: memoryview) -> None:
        """Hidden states; raises ProtocolError (theirs) if they come from where none are due."""
        session = self._sessions.of_frame(message.session, message.epoch)
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
            self._sessions.fail(session, error)
        except ShardmeshError as error:
            self._sessions.report_hop(session, "previous", error)

    def begin_branch(self, session: StageSession, branch: int, position: int) -> None:
        """Drops what older branches put at this position and behind."""
        session.branch = branch
        if position == session.n_received:
            return
        session.n_received = position
        session.handed.forget_from(position)
        self._sessions.worker.forget(
            session.session_id, lambda work: work.batch.position >= position
        )
        if self._engine.info.is_last:
            return  # it computed nothing that was wrong
        session.outgoing.begin_branch(branch, position)
        self._sessions.run_in_engine(
            session, lambda: self._engine.trim_sequence(session.sequence, position)
        )

    def _enqueue(
        self,
        session: StageSession,
        link: Link,
        batch: MicroBatch,
        message: TokenBatch | HiddenBatch,
    ) -> None:
        """Queues a micro-batch; raises ProtocolError for one that cannot be right, InputError."""
        if message.branch > session.branch and batch.position <= session.n_received:
            self.begin_branch(session, message.branch, batch.position)
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
            session.epoch,
            message.branch,
            message.check,
            message.hand,
            timings,
            received_s=time.monotonic(),
        )
        self._sessions.worker.add(session.session_id, batch.n_tokens, work)
        session.n_received += batch.n_tokens
        session.may_be_handed = message.hand
        if batch.sample and session.next_stage is None and session.first_sampled is None:
            session.first_sampled = batch.position
        self._copier.consider(session)
