"""Which micro-batches a stage computes next.  Pure: no clock, no engine, no waiting, no lock.

Two phases take turns as long as both have work:

  decode   the next single token of every session that has one
  prefill  one micro-batch of several tokens, of the session that has waited longest

A session's micro-batches keep their order.  Those of a round are computed at once as far as that
changes no bit (see `engine.at_once`), and the others one after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from shardmesh.errors import ProtocolError
from shardmesh.wire.limits import DECODE_ROUND_MAX, SESSION_BATCHES_WAITING_MAX

Item = TypeVar("Item")


class Scheduler(Generic[Item]):
    """Waiting micro-batches by session; `Item` is whatever the stage wants back."""

    def __init__(self, n_decode_round_max: int = DECODE_ROUND_MAX) -> None:
        self._n_decode_round_max = n_decode_round_max
        self._waiting: dict[bytes, deque[tuple[int, Item]]] = {}  # in order of last service
        self._decode_is_next = True

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
        decode = [s for s, queue in self._waiting.items() if queue[0][0] == 1]
        prefill = [s for s, queue in self._waiting.items() if queue[0][0] > 1]
        use_decode = bool(decode) and (self._decode_is_next or not prefill)
        self._decode_is_next = not use_decode
        chosen = decode[: self._n_decode_round_max] if use_decode else prefill[:1]
        return [self._take(session) for session in chosen]

    def _take(self, session: bytes) -> Item:
        queue = self._waiting.pop(session)
        _, item = queue.popleft()
        if queue:
            self._waiting[session] = queue  # behind all others
        return item
