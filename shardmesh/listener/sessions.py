"""The sessions that a stage holds: found by their frames, told of trouble, ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Literal

import trio

from shardmesh.engine.base import Engine
from shardmesh.errors import ShardmeshError
from shardmesh.links.link import Link
from shardmesh.listener.computing import Computing
from shardmesh.listener.kept_sequences import KeptSequences
from shardmesh.listener.stage_session import (
    StageCounters,
    StageIdentity,
    StageSession,
    Work,
    failure_message,
    hop_failure_message,
)
from shardmesh.listener.worker import Calculation, Computes
from shardmesh.wire.messages import Message

logger = logging.getLogger(__name__)

Side = Literal["previous", "next"]
MakeWorker = Callable[[Calculation[Work]], "Computes[Work]"]


def send_or_close(link: Link, message: Message) -> None:
    """Sends a message that nobody waits for; a link that takes none is ended."""
    try:
        link.send(message)
    except ShardmeshError as error:
        # Its coordinator is gone or does not read: closing tells it, if anything does.
        link.close(error)


class HeldSessions:
    """Sessions by id, the sequences that they have, and the thread that computes for them.

    All of it runs on the trio loop but what `computing.Sessions` names.
    """

    def __init__(self, engine: Engine, identity: StageIdentity, make_worker: MakeWorker) -> None:
        self.counters = StageCounters()
        self.sequences = KeptSequences(engine.info.n_parallel, engine.info.n_ctx)
        self._engine = engine
        self._identity = identity
        self._by_id: dict[bytes, StageSession] = {}
        self._number_changed = trio.Event()
        self._computing = Computing(engine, identity, self.counters, self)
        self.worker = make_worker(self._computing)
        self._trio_token = trio.lowlevel.current_trio_token()

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[StageSession]:
        """Those of now; the caller may end some meanwhile."""
        return iter(list(self._by_id.values()))

    def get(self, session_id: bytes) -> StageSession | None:
        return self._by_id.get(session_id)

    def of_frame(self, session_id: bytes, epoch: int) -> StageSession | None:
        """The session a frame belongs to; None for one that is over or of another epoch."""
        session = self._by_id.get(session_id)
        if session is None or session.epoch != epoch:
            self.counters.n_late_frames += 1
            return None
        return session

    def is_in(self, session: StageSession, epoch: int) -> bool:
        """Whether it is still here, and in that epoch."""
        return self.is_current(session) and session.epoch == epoch

    async def wait_number_is_not(self, n_sessions: int) -> None:
        """Returns once there are more or fewer sessions than that."""
        while len(self._by_id) == n_sessions:
            await self._number_changed.wait()

    def n_of_node(self, peer_id: str) -> int:
        """Sessions of one coordinator."""
        return sum(session.coordinator.peer_id == peer_id for session in self._by_id.values())

    def add(self, session: StageSession) -> None:
        """A session whose sequence is taken."""
        self._by_id[session.session_id] = session
        self._tell_number()
        self.counters.n_sessions_opened += 1
        self.counters.n_sequences_kept = self.sequences.n_kept

    def release(self, session: StageSession, *, is_well: bool = True) -> None:
        """Frees the session's sequence, which keeps the prompt that was computed if all is well.

        The next session can have it at once: the engine's jobs keep their order, so it is emptied
        behind whatever is computed now and before whatever comes.
        """
        self._by_id.pop(session.session_id, None)
        self._tell_number()
        session.outgoing.hold()
        session.connecting.cancel()
        session.copy = None
        self.worker.forget(session.session_id)
        held = session.held_prefix if is_well else ()
        n_keep = held[-1].end if held else 0
        self.run_in_engine(None, lambda: self._engine.close_sequence(session.sequence, n_keep))
        self.sequences.give_back(session.sequence, held)
        self.counters.n_sequences_kept = self.sequences.n_kept

    def _tell_number(self) -> None:
        self._number_changed.set()
        self._number_changed = trio.Event()

    def run_in_engine(self, session: StageSession | None, call: Callable[[], None]) -> None:
        """Has the worker make a call before its next batch; a failure ends the session."""
        self.worker.do(self._computing.job(session, call))

    # -- trouble -------------------------------------------------------------------------------

    def fail(self, session: StageSession, error: ShardmeshError) -> None:
        """Ends a session and tells its coordinator why."""
        if not self.is_current(session):
            return
        self.counters.n_sessions_failed += 1
        self.release(session, is_well=False)
        self.refuse(session.coordinator, session.session_id, session.epoch, error)

    def refuse(self, link: Link, session_id: bytes, epoch: int, error: ShardmeshError) -> None:
        """Says that the session is not, or no longer, on this stage."""
        logger.info("session ended: [%s] %s", error.code, error)
        send_or_close(link, failure_message(session_id, epoch, self._identity, error))

    def report_hop(
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
        send_or_close(session.coordinator, hop_failure_message(session, hop, error))

    # -- from the worker's thread ----------------------------------------------------------------

    @property
    def n_sessions(self) -> int:
        """See `computing.Sessions`."""
        return len(self._by_id)

    def is_current(self, session: StageSession) -> bool:
        """See `computing.Sessions`."""
        return self._by_id.get(session.session_id) is session

    def fail_soon(self, session: StageSession, error: ShardmeshError) -> None:
        """See `computing.Sessions`."""
        self._trio_token.run_sync_soon(self.fail, session, error)

    def report_next_soon(self, session: StageSession, error: ShardmeshError, epoch: int) -> None:
        """See `computing.Sessions`."""
        self._trio_token.run_sync_soon(self.report_hop, session, "next", error, epoch)
