"""What one side of a session sends to its next hop, kept so that it can be sent again.

A stage keeps the hidden states that it computed, a last stage its last results, a coordinator its
micro-batches of token ids.  When a hop changes, sending stops (`hold`), the other side says what it
has, and sending goes on from there under a new epoch (`resume`).  Each position is sent once in an
epoch, in order, whoever computes meanwhile.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Protocol

import msgspec

from shardmesh.errors import ProtocolError
from shardmesh.links.branches import Branches
from shardmesh.wire.limits import REPLAY_BATCHES_IN_FLIGHT_MAX
from shardmesh.wire.messages import BatchDone, HiddenBatch, Message, TokenBatch

SentMessage = TokenBatch | HiddenBatch | BatchDone


class Hop(Protocol):
    """Where messages go: a link."""

    def send(self, message: Message, body: bytes | memoryview = b"") -> None: ...


class _Kept(msgspec.Struct, frozen=True):
    position: int
    n_tokens: int
    message: SentMessage
    body: bytes | memoryview

    @property
    def n_bytes(self) -> int:
        return len(self.body) + 64 * self.n_tokens  # the header, roughly


def _branch_of(message: SentMessage) -> int:
    """Results have none: the last stage computes only what is right."""
    return 0 if isinstance(message, BatchDone) else message.branch


class Outgoing:
    """The micro-batches of one session on their way to the next hop; from any thread."""

    def __init__(
        self, epoch: int, *, n_bytes_max: int, n_kept_max: int | None = None, start: int = 0
    ) -> None:
        """Holds until `resume`; beyond a bound the oldest that were sent are forgotten.

        What lies below `start` was never here, and cannot be sent.
        """
        self._lock = threading.Lock()
        self._n_bytes_max = n_bytes_max
        self._n_kept_max = n_kept_max
        self._kept: deque[_Kept] = deque()
        self._n_bytes = 0
        self._kept_from = start
        self._end = start  # behind the newest
        self._epoch = epoch
        self._hop: Hop | None = None
        self._next = start  # position of what is sent next
        self._next_index = 0  # and its place among what is kept
        self._n_replay = 0
        self._unacknowledged: deque[int] = deque()  # ends of replayed micro-batches
        self._branches = Branches()

    @property
    def hop(self) -> Hop | None:
        """Where it goes, None while it is held."""
        return self._hop

    @property
    def kept_from(self) -> int:
        """All from this position on can be sent again, what is still to come included."""
        return self._kept_from

    @property
    def n_computed(self) -> int:
        """All positions below were added."""
        return self._end

    @property
    def n_done(self) -> int:
        """All positions below are computed, and sent or not needed."""
        with self._lock:
            if self._next_index < len(self._kept):
                return self._kept[self._next_index].position
            return self._end

    def add(
        self, position: int, n_tokens: int, message: SentMessage, body: bytes | memoryview = b""
    ) -> None:
        """Keeps a micro-batch and sends it, now or when its turn comes.

        Raises what the link's `send` raises; the micro-batch is kept then, and held.
        """
        with self._lock:
            branch = _branch_of(message)
            if self._branches.is_void(branch, position):
                return  # it was being computed when a newer branch took its place
            self._branches.forget_until(branch)
            if position > self._end:
                raise ProtocolError(f"position {position} is sent before {self._end}")
            if position < self._end:
                return  # computed before a trim that has forgotten it
            kept = _Kept(position, n_tokens, message, body)
            self._kept.append(kept)
            self._n_bytes += kept.n_bytes
            self._end += n_tokens
            self._pump()

    def hold(self, epoch: int | None = None) -> None:
        """Sends nothing more until `resume`, and that in another epoch."""
        with self._lock:
            self._hop = None
            self._epoch = self._epoch if epoch is None else epoch

    def resume(self, hop: Hop, *, send_from: int = 0, n_replay: int = 0) -> None:
        """Sends what is kept from a position on, and whatever comes after it.

        Raises ProtocolError (theirs) for a position that is not kept or inside a micro-batch, and
        what the link's `send` raises.
        """
        with self._lock:
            index = self._index_of(send_from)
            if index is None:
                raise ProtocolError(
                    f"position {send_from} cannot be sent again", code="OUT_OF_ORDER"
                )
            self._hop = hop
            self._next, self._next_index = send_from, index
            self._n_replay = n_replay
            self._unacknowledged.clear()
            self._pump()

    def taken(self, n_taken: int) -> None:
        """The next hop has dealt with all positions below; raises what the link's `send` raises."""
        with self._lock:
            while self._unacknowledged and self._unacknowledged[0] <= n_taken:
                self._unacknowledged.popleft()
            self._pump()

    def is_void(self, branch: int, position: int) -> bool:
        """Whether a newer branch began there or before: `add` would ignore it."""
        with self._lock:
            return self._branches.is_void(branch, position)

    def begin_branch(self, branch: int, position: int) -> None:
        """Forgets what older branches put at this position and behind, or have yet to."""
        with self._lock:
            self._branches.begin(branch, position)
        self.forget_from(position)

    def forget_from(self, n_keep: int) -> None:
        """Forgets the positions from `n_keep` on, which were trimmed."""
        with self._lock:
            while self._kept and self._kept[-1].position >= n_keep:
                self._n_bytes -= self._kept.pop().n_bytes
            if self._kept and self._kept[-1].position + self._kept[-1].n_tokens > n_keep:
                # A part of a micro-batch cannot be sent: its shape decides the last bits.
                self._kept.clear()
                self._n_bytes, self._kept_from = 0, n_keep
            self._end = min(self._end, n_keep)
            self._kept_from = min(self._kept_from, n_keep)
            self._next = min(self._next, n_keep)  # it may wait for what is still to be computed
            self._next_index = min(self._next_index, len(self._kept))

    def _index_of(self, position: int) -> int | None:
        if position >= self._end:
            # What was not computed yet is waited for, and what is behind is not needed again.
            return len(self._kept)
        return next((i for i, kept in enumerate(self._kept) if kept.position == position), None)

    def _pump(self) -> None:
        while self._hop is not None and self._next_index < len(self._kept):
            kept = self._kept[self._next_index]
            if kept.position < self._next:  # computed again, and the next hop has it
                self._next_index += 1
                continue
            is_replay = kept.position < self._n_replay
            if is_replay and len(self._unacknowledged) >= REPLAY_BATCHES_IN_FLIGHT_MAX:
                break
            try:
                self._hop.send(self._as_sent(kept.message, is_replay=is_replay), kept.body)
            except BaseException:
                self._hop = None
                raise
            self._next_index += 1
            self._next = kept.position + kept.n_tokens
            if is_replay:
                self._unacknowledged.append(self._next)
        self._forget_oldest()

    def _as_sent(self, message: SentMessage, *, is_replay: bool) -> SentMessage:
        """In this epoch; what is sent again is known to be right, as is what comes behind it."""
        if is_replay and not isinstance(message, BatchDone):
            return msgspec.structs.replace(message, epoch=self._epoch, check=b"", hand=False)
        if message.epoch == self._epoch:
            return message
        return msgspec.structs.replace(message, epoch=self._epoch)

    def _forget_oldest(self) -> None:
        # Not while it is held: the other side was told what is kept.
        while self._hop is not None and self._next_index > 0 and self._is_full():
            oldest = self._kept.popleft()
            self._n_bytes -= oldest.n_bytes
            self._kept_from = oldest.position + oldest.n_tokens
            self._next_index -= 1

    def _is_full(self) -> bool:
        too_many = self._n_kept_max is not None and len(self._kept) > self._n_kept_max
        return too_many or self._n_bytes > self._n_bytes_max
