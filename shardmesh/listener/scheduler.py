"""Which micro-batches a stage computes next.  Pure: no clock, no engine, no waiting, no lock.

Two phases take turns as long as both have work:

  decode   one round: the next single token of every session that has one when the round begins
  prefill  one micro-batch of several tokens, of the session that has waited longest

A session's micro-batches keep their order.  A round is computed in parts: whoever has waited
longest, and who may go together with it.  Who comes meanwhile may go together with others, too, so
that sessions which once went together stay together in all stages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from shardmesh.errors import ProtocolError
from shardmesh.wire.limits import DECODE_ROUND_MAX, SESSION_BATCHES_WAITING_MAX

Item = TypeVar("Item")

Together = Callable[[Sequence[Item]], Sequence[int]]
"""Of the single tokens that wait, the first of them longest, the indices of those to compute at
once: that of the first is among them."""


class Scheduler(Generic[Item]):
    """Waiting micro-batches by session; `Item` is whatever the stage wants back."""

    def __init__(
        self, together: Together[Item], n_decode_round_max: int = DECODE_ROUND_MAX
    ) -> None:
        self._together = together
        self._n_decode_round_max = n_decode_round_max
        self._waiting: dict[bytes, deque[tuple[int, Item]]] = {}  # in order of last service
        self._round: list[bytes] = []  # sessions that prefill waits for
        self._prefill_is_next = False  # once the round is over

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, session: bytes, n_tokens: int, item: Item) -> None:
        """Queues a micro-batch of a session; raises ProtocolError (theirs) when it has too many."""
        queue = self._waiting.setdefault(session, deque())
        if len(queue) >= SESSION_BATCHES_WAITING_MAX:
            raise ProtocolError(
                f"more than {SESSION_BATCHES_WAITING_MAX} micro-batches of a session wait",
                code="TOO_MANY_BATCHES",
            )
        queue.append((n_tokens, item))

    def remove(self, session: bytes, is_void: Callable[[Item], bool] | None = None) -> None:
        """Forgets what waits of a session, or what of it is void."""
        queue = self._waiting.get(session, deque())
        kept = deque(each for each in queue if is_void is not None and not is_void(each[1]))
        if kept:
            self._waiting[session] = kept  # in its turn
        else:
            self._waiting.pop(session, None)

    def next_batch(self) -> list[Item]:
        """What to compute now; empty only when nothing waits."""
        decode = {s: queue[0][1] for s, queue in self._waiting.items() if queue[0][0] == 1}
        self._round = [session for session in self._round if session in decode]
        if not self._round:
            prefill = next((s for s, queue in self._waiting.items() if queue[0][0] > 1), None)
            if prefill is not None and (self._prefill_is_next or not decode):
                self._prefill_is_next = False
                return [self._take(prefill)]
            self._round = list(decode)[: self._n_decode_round_max]
            self._prefill_is_next = bool(decode)
        return [self._take(session) for session in self._part_of_round(decode)]

    def _part_of_round(self, decode: dict[bytes, Item]) -> list[bytes]:
        """Whoever has waited longest, and who goes together with it."""
        sessions = list(dict.fromkeys((*self._round, *decode)))  # the round's own first
        if not sessions:
            return []
        return [sessions[i] for i in self._together([decode[session] for session in sessions])]

    def _take(self, session: bytes) -> Item:
        queue = self._waiting.pop(session)
        _, item = queue.popleft()
        if queue:
            self._waiting[session] = queue  # behind all others
        if session in self._round:
            self._round.remove(session)
        return item
