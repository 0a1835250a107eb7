"""The KV that a stage keeps for other stages, as their standby.

A copy is rows of bytes in memory, and takes no sequence before it is needed.  It comes from the one
node that the coordinator named, and only that coordinator's session can begin behind it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from shardmesh.engine.base import Cells, EngineInfo
from shardmesh.errors import BusyError, InputError, ProtocolError
from shardmesh.links.link import Link
from shardmesh.wire.limits import COPIES_BYTES_MAX, COPIES_MAX
from shardmesh.wire.messages import KvCopy, StandBy


@dataclasses.dataclass(eq=False)
class Copy:
    """What is there of one session."""

    coordinator: Link
    source: str  # peer id of the stage that sends
    n_ctx: int
    parts: list[Cells] = dataclasses.field(default_factory=list)
    n_held: int = 0

    def cells(self) -> Cells:
        """All positions, (n_held, bytes of one)."""
        return np.concatenate(self.parts)


class Copies:
    """All copies of one stage.  Not thread-safe."""

    def __init__(self, info: EngineInfo) -> None:
        self.n_bytes_max = COPIES_BYTES_MAX
        self._info = info
        self._copies: dict[bytes, Copy] = {}

    def __len__(self) -> int:
        return len(self._copies)

    @property
    def n_bytes(self) -> int:
        """The memory that they take."""
        return self._info.cell_bytes * sum(copy.n_held for copy in self._copies.values())

    def n_of_node(self, peer_id: str) -> int:
        """Copies that one coordinator has here."""
        return sum(copy.coordinator.peer_id == peer_id for copy in self._copies.values())

    def begin(self, coordinator: Link, message: StandBy) -> None:
        """Makes room for a copy, an empty one if there was one before.

        Raises InputError (theirs) for KV that this engine cannot take, ProtocolError (theirs) for a
        session of another coordinator, BusyError (the moment's).
        """
        known = self._copies.get(message.session)
        if known is not None and known.coordinator.peer_id != coordinator.peer_id:
            raise ProtocolError("another coordinator has a session of this name")
        if not self._info.cell_bytes or message.fingerprint != self._info.fingerprint:
            raise InputError("this node computes otherwise", code="OTHER_ENGINE")
        if known is None and len(self._copies) >= COPIES_MAX:
            raise BusyError(f"this node stands by for {COPIES_MAX} sessions already")
        n_ctx = min(message.n_ctx, self._info.n_ctx)
        self._copies[message.session] = Copy(coordinator, message.source, n_ctx)

    def add(self, peer_id: str, message: KvCopy, body: memoryview) -> int | None:
        """Keeps positions that a node sends; how many there are then.

        0 if nobody wants them or there is no room, None for what is late.  Raises ProtocolError
        (theirs) for more than was asked for or a wrong size.
        """
        copy = self._copies.get(message.session)
        if copy is None or copy.source != peer_id:
            return 0
        if message.position == 0:
            copy.parts, copy.n_held = [], 0
        if message.position + message.n_tokens > copy.n_ctx:
            raise ProtocolError("KV came beyond the context", code="CONTEXT_FULL")
        if message.n_bytes != message.n_tokens * self._info.cell_bytes:
            raise ProtocolError("KV came of another size than this model's", code="BAD_FRAME")
        if message.position != copy.n_held:
            return None  # of a copy that was begun anew since
        if self.n_bytes + message.n_bytes > self.n_bytes_max:
            return 0
        part = np.frombuffer(body, dtype=np.uint8).reshape(message.n_tokens, -1)
        copy.parts.append(part)
        copy.n_held += message.n_tokens
        return copy.n_held

    def find(self, session: bytes, coordinator: Link) -> Copy | None:
        """What there is for a session of this coordinator, if anything; it changes no more."""
        copy = self._copies.get(session)
        if copy is None or copy.coordinator is not coordinator or not copy.n_held:
            return None
        return dataclasses.replace(copy, parts=list(copy.parts))

    def drop(self, session: bytes, coordinator: Link) -> None:
        """Forgets a copy, if it is this coordinator's."""
        copy = self._copies.get(session)
        if copy is not None and copy.coordinator is coordinator:
            del self._copies[session]

    def drop_all_of(self, coordinator: Link) -> None:
        """Forgets the copies of a coordinator that is gone."""
        for session, copy in list(self._copies.items()):
            if copy.coordinator is coordinator:
                del self._copies[session]
