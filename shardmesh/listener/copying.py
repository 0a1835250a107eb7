"""A stage copies the KV of its sessions to their standbys, in the background.

The engine is read between two computations, seldom enough that it costs some percent at most; what
it gives goes out in frames that wait for each other, so that a slow standby only has less.  Nothing
of it can fail a session: a copy that cannot be made is left out.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

import trio

from shardmesh.engine.base import Cells, Engine
from shardmesh.errors import ShardmeshError
from shardmesh.links.link import Link
from shardmesh.wire.limits import DRAFTS_MAX, HANDED_AHEAD_MAX, KV_COPY_WINDOW_BYTES
from shardmesh.wire.messages import CopyTo, KvCopy, KvTaken, NextStage

logger = logging.getLogger(__name__)

STEP_TOKENS_MIN = 32
"""Positions that are worth a look into the engine."""

STEP_SHARE = 1 / 32
"""The same, of those that were copied before: the engine always gives the whole sequence.

So a position is read 32 times, while its text doubles.  With some KiB of a position, that is a
tenth of a millisecond for each token; and a standby lacks a 32nd of the text at most.
"""

FRAME_BYTES = 512 * 1024
"""KV in one frame: sealing it takes half a millisecond, for which everything else waits."""


@dataclasses.dataclass(eq=False)
class CopyOut:
    """The copy of one session on its way."""

    standby: NextStage
    link: Link | None = None  # None until it is dialed
    n_read: int = 0  # positions that were read from the engine
    n_sent: int = 0
    n_taken: int = 0
    unsent: Cells | None = None  # the positions from n_sent to n_read
    is_reading: bool = False


class CopiedSession(Protocol):
    """What copying needs of a session on this stage."""

    copy: CopyOut | None

    @property
    def session_id(self) -> bytes: ...

    @property
    def sequence(self) -> int: ...

    @property
    def n_copyable(self) -> int: ...


N_UNCERTAIN_MAX = DRAFTS_MAX + HANDED_AHEAD_MAX
"""Of the newest positions, those that a repair may drop: guesses, and what nobody heard of yet."""


def n_final(n_received: int, first_sampled: int | None) -> int:
    """Positions whose KV will not change and is of use to a standby.

    What lies N_UNCERTAIN_MAX behind the newest micro-batch is known to the coordinator.  A last
    stage samples again all that it sampled, which brings its sampler into the same state, so the KV
    behind the first sampled position, if there is one, is computed again anyway.
    """
    n_most = max(0, n_received - N_UNCERTAIN_MAX)
    return n_most if first_sampled is None else min(n_most, first_sampled)


def is_due(n_copyable: int, n_read: int) -> bool:
    """Whether it pays to look into the engine again."""
    return n_copyable - n_read >= max(STEP_TOKENS_MIN, n_read * STEP_SHARE)


class Copier:
    """The copies of one stage's sessions; all but the engine's part runs on the trio loop."""

    def __init__(
        self,
        engine: Engine,
        do: Callable[[Callable[[], None]], None],
        nursery: trio.Nursery,
        get_link: Callable[[NextStage], Awaitable[Link]],
    ) -> None:
        """`do` has the engine's thread make a call before its next computation."""
        self.n_bytes_sent = 0
        self._engine = engine
        self._do = do
        self._nursery = nursery
        self._get_link = get_link
        self._trio_token = trio.lowlevel.current_trio_token()

    def begin(self, session: CopiedSession, message: CopyTo) -> None:
        """Copies to this standby from now on, from the beginning, if that can be done."""
        info = self._engine.info
        if not info.cell_bytes or message.fingerprint != info.fingerprint:
            logger.info("a session cannot be copied: the standby computes otherwise")
            return
        session.copy = CopyOut(message.standby)
        self._nursery.start_soon(self._connect, session, session.copy)

    def consider(self, session: CopiedSession) -> None:
        """Reads on, if enough was computed since and all that was read is sent."""
        copy = session.copy
        if copy is None or copy.link is None or copy.is_reading or copy.unsent is not None:
            return
        if is_due(session.n_copyable, copy.n_read):
            copy.is_reading = True
            # The bound is that of now: what the engine holds below it is final in its own order.
            self._do(partial(self._read, session, copy, session.n_copyable))

    def taken(self, session: CopiedSession, link: Link, message: KvTaken) -> None:
        """The standby has room for more, or none at all."""
        copy = session.copy
        if copy is None or copy.link is not link:
            return
        if message.n_taken == 0:
            self._stop(session, copy)
            return
        copy.n_taken = max(copy.n_taken, min(message.n_taken, copy.n_sent))
        self._send(session, copy)

    def lost(self, session: CopiedSession, link: Link) -> None:
        """The link to the standby has ended; the coordinator will name another one."""
        if session.copy is not None and session.copy.link is link:
            session.copy = None

    async def _connect(self, session: CopiedSession, copy: CopyOut) -> None:
        try:
            copy.link = await self._get_link(copy.standby)
        except ShardmeshError as error:
            logger.info("no copy to %s: [%s] %s", copy.standby.peer_id, error.code, error)
            self._stop(session, copy)
        else:
            self.consider(session)

    def _read(self, session: CopiedSession, copy: CopyOut, n_copyable: int) -> None:
        """In the engine's thread."""
        cells: Cells | None = None
        try:
            end = min(n_copyable, self._engine.n_held(session.sequence))
            if session.copy is copy and end > copy.n_read:
                cells = self._engine.read_cells(session.sequence, copy.n_read, end)
        except ShardmeshError as error:
            logger.info("a session is not copied further: [%s] %s", error.code, error)
            self._trio_token.run_sync_soon(self._stop, session, copy)
            return
        self._trio_token.run_sync_soon(self._have_read, session, copy, cells)

    def _have_read(self, session: CopiedSession, copy: CopyOut, cells: Cells | None) -> None:
        copy.is_reading = False
        if cells is not None:
            copy.unsent = cells
            copy.n_read += len(cells)
            self._send(session, copy)

    def _send(self, session: CopiedSession, copy: CopyOut) -> None:
        """As much as may be under way."""
        link, cell_bytes = copy.link, self._engine.info.cell_bytes
        n_at_once = max(1, FRAME_BYTES // cell_bytes)
        while session.copy is copy and link is not None and copy.unsent is not None:
            if (copy.n_sent - copy.n_taken) * cell_bytes >= KV_COPY_WINDOW_BYTES:
                return
            cells, rest = copy.unsent[:n_at_once], copy.unsent[n_at_once:]
            frame = KvCopy(
                session=session.session_id,
                position=copy.n_sent,
                n_tokens=len(cells),
                n_bytes=cells.nbytes,
            )
            try:
                link.send(frame, cells.data.cast("B"))
            except ShardmeshError as error:
                logger.info("no more is copied: [%s] %s", error.code, error)
                self._stop(session, copy)
                return
            self.n_bytes_sent += cells.nbytes
            copy.n_sent += len(cells)
            copy.unsent = rest if len(rest) else None
        self.consider(session)

    def _stop(self, session: CopiedSession, copy: CopyOut) -> None:
        if session.copy is copy:
            session.copy = None
